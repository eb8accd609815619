"""Charts as self-contained SVG text. Functions of plain numbers; nothing here knows a stage."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {"base": "#9aa0a6", "mim": "#1a73e8", "style": "#f29900", "oracle": "#188038", "other": "#5f6368"}
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#eceff1",
        "axes.axisbelow": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "mim_ray",
    }
)


def loss_curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """One small panel per curve of (step, loss) points."""
    columns = min(4, max(1, len(curves)))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.9 * columns, 2.1 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        axis.plot([p[0] for p in points], [p[1] for p in points], color=COLORS["mim"], linewidth=1.4)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step")
    figure.tight_layout()
    return _svg(figure)


def bars(groups: Mapping[str, Mapping[str, tuple[float, float, float]]], label: str) -> str:
    """Grouped bars with 95 % intervals: group -> series (base, mim, …) -> (value, low, high)."""
    figure, axis = plt.subplots(figsize=(1.6 + 1.9 * len(groups), 2.8))
    values = [v for series in groups.values() for triple in series.values() for v in triple]
    for position, series in enumerate(groups.values()):
        width = 0.8 / max(1, len(series))
        for index, (name, (value, low, high)) in enumerate(series.items()):
            x = position - 0.4 + width * (index + 0.5)
            error = [[value - low], [high - value]]
            color = COLORS.get(name, COLORS["other"])
            axis.bar(x, value, width * 0.92, color=color, yerr=error, ecolor="#3c4043", capsize=2, label=name)
            axis.annotate(
                f"{value:.3f}",
                (x, high),
                ha="center",
                va="bottom",
                fontsize=7,
                xytext=(0, 2),
                textcoords="offset points",
            )
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylim(min(0.5, min(values, default=0.5)) - 0.005, max(values, default=1.0) + 0.03)
    axis.set_ylabel(label)
    _legend_once(axis)
    return _svg(figure)


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """A value with its 95 % interval per row, and a line at zero."""
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.27 * len(rows)))
    for position, (_, value, low, high) in enumerate(rows):
        axis.plot([low, high], [position, position], color="#aecbfa", linewidth=5, solid_capstyle="round")
        axis.plot(value, position, "o", color=COLORS["mim"], markersize=5)
    axis.axvline(0.0, color="#5f6368", linewidth=1)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(label)
    return _svg(figure)


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """Points of named groups: (group, x, y)."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    names = list(dict.fromkeys(name for name, _, _ in points))
    colors = plt.get_cmap("tab20")
    for number, name in enumerate(names):
        chosen = [(x, y) for group, x, y in points if group == name]
        axis.plot([x for x, _ in chosen], [y for _, y in chosen], "o", color=colors(number % 20), label=name)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    _legend_once(axis)
    return _svg(figure)


def reliability(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Share of positives over mean probability, both logarithmic; on the diagonal probabilities are true."""
    figure, axis = plt.subplots(figsize=(3.8, 3.2))
    values = [value for curve in curves.values() for part in curve for value in part if value > 0]
    ends = (min(values, default=0.01) * 0.8, max(values, default=1.0) * 1.2)
    axis.plot(ends, ends, color="#5f6368", linewidth=1)
    for name, (prob, positive) in curves.items():
        axis.plot(
            prob, positive, "o-", color=COLORS.get(name, COLORS["other"]), markersize=3, linewidth=1.2, label=name
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("mean probability")
    axis.set_ylabel("share of positives")
    _legend_once(axis)
    return _svg(figure)


def _legend_once(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=False))
    axis.legend(unique.values(), unique.keys(), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
