"""The tables as Markdown and as one self-contained HTML file with plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import mim_ray
from mim_ray import artifacts
from mim_ray.evaluation.bootstrap import Estimate
from mim_ray.pipeline.report import page, plots
from mim_ray.pipeline.reproduce.tables import Table

Points = Sequence[tuple[str, float, float]]


@dataclass(frozen=True)
class Pages:
    """What both files show.

    Attributes:
        figures: (title, note, gains) of Figures 5 and 6. exchange: (experiment, recall@10, AUC), one per encoder and seed.
        remarks: sentences on seeds, intervals and what was left out.
    """

    title: str
    remarks: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[tuple[str, str, Sequence[tuple[str, Estimate]]]]
    exchange: Points

    def markdown(self) -> str:
        """Tables, then the points of the figures as tables."""
        lines = [f"# {self.title}", "", *self.remarks, ""]
        for table in self.tables:
            lines += [f"## {table.title}", "", table.note, "", *markdown_rows(table.header, table.rows), ""]
        for title, note, gains in self.figures:
            rows = [
                [label, *(f"{value:+.4f}" if value is not None else "—" for value in gain)] for label, gain in gains
            ]
            lines += [f"## {title}", "", note, "", *markdown_rows(["", "difference", "low", "high"], rows), ""]
        if self.exchange:
            rows = [[name, f"{recall:.4f}", f"{auc:.4f}"] for name, recall, auc in self.exchange]
            lines += ["## Exchange rate", "", self.exchange_note, ""]
            lines += [*markdown_rows(["encoder", "recall@10", "AUC of +MIM"], rows), ""]
        return "\n".join(lines)

    def html(self) -> str:
        """The same with plots."""
        sections = [
            page.section(table.title, table.note, page.table(table.header, table.rows), *_gains(table.gains))
            for table in self.tables
        ]
        sections += [page.section(title, note, *_gains(gains)) for title, note, gains in self.figures]
        if self.exchange:
            plot = plots.scatter(self.exchange, "held-out recall@10, query picture to item", "AUC of +MIM (test)")
            sections.append(page.section("Exchange rate", self.exchange_note, plot))
        subtitle = " ".join([f"mim_ray {mim_ray.__version__}, {artifacts.now()}.", *self.remarks])
        return page.page(self.title, subtitle, sections)

    @property
    def exchange_note(self) -> str:
        """What a point of recall is worth, by least squares, and how well a line describes it."""
        note = "Held-out retrieval of each encoder against the AUC of the +MIM model on its embeddings."
        recalls, aucs = [p[1] for p in self.exchange], [p[2] for p in self.exchange]
        if len(set(recalls)) < 3:
            return note
        line = statistics.linear_regression(recalls, aucs)
        correlation = statistics.correlation(recalls, aucs) if len(set(aucs)) > 1 else 0.0
        return (
            f"{note} 0.01 of recall@10 goes with {line.slope / 100:+.5f} AUC (least squares over {len(recalls)} encoders and "
            f"seeds, correlation {correlation:.2f})."
        )


def markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; a | in a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


def _gains(gains: Sequence[tuple[str, Estimate]]) -> list[str]:
    shown = [
        (
            label,
            gain.value,
            gain.value if gain.low is None else gain.low,
            gain.value if gain.high is None else gain.high,
        )
        for label, gain in gains
        if gain.value is not None
    ]
    return [plots.intervals(shown, "AUC difference")] if shown else []
