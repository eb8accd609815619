"""Measured rates: what benchmarks found, each with the machine, the date and the command, for pipeline/plan.py.

    rates = load_rates(["scale.json", "extraction.json"])     # what ships with the package, then those files, later ones win
    rates["build_rows_per_s"].value                           # rows per second and core

A file is a benchmark's --json result (its "rates" and "machine"), or rates saved by `save_rates`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mim_ray.errors import ConfigError

SHIPPED = "measured_rates.json"


@dataclass(frozen=True)
class Rate:
    """One measured figure. `note` says what was measured, `source` on which machine, when and by which command."""

    value: float
    unit: str
    note: str
    source: str


def load_rates(files: Sequence[str] = ()) -> dict[str, Rate]:
    """Name -> rate of the package's own file and of `files`; a later file replaces a rate of the same name.

    Raises:
        ConfigError: a file is missing or holds no rates.
    """
    shipped = resources.files("mim_ray.pipeline").joinpath(SHIPPED).read_text()
    rates = _read(json.loads(shipped), SHIPPED)
    for file in files:
        try:
            found = json.loads(Path(file).expanduser().read_text())
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be read ({error.strerror}). Give the --json result of a benchmark."
            ) from None
        except ValueError as error:
            raise ConfigError(f"{file} is no JSON ({error}). Give the --json result of a benchmark.") from None
        rates |= _read(found, file)
    return rates


def save_rates(path: str, rates: dict[str, Rate]) -> None:
    """Write rates to a file that `load_rates` reads."""
    value = {"rates": {name: asdict(rate) | {"value": _rounded(rate.value)} for name, rate in sorted(rates.items())}}
    Path(path).write_text(json.dumps(value, indent=1) + "\n")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _read(report: Any, file: str) -> dict[str, Rate]:
    rates = _rates_of(report) if isinstance(report, dict) else None
    if not isinstance(rates, dict) or not rates:
        raise ConfigError(
            f'{file} holds no "rates". Give the --json result of benchmarks/scale.py or benchmarks/extraction.py.'
        )
    try:
        source = _source(report)
        return {
            name: Rate(float(rate["value"]), rate["unit"], rate.get("note", ""), rate.get("source") or source)
            for name, rate in rates.items()
            if rate.get("value") is not None
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{file}: a rate has no value or unit ({error!r}). Write it again with the benchmark."
        ) from None


def _rates_of(report: dict[str, Any]) -> Any:
    """The report's "rates"; of benchmarks/extraction.py the items per second of the whole job, by core."""
    if report.get("benchmark") != "extraction" or "rates" in report:
        return report.get("rates")
    rates, cores = {}, report.get("machine", {}).get("threads", 1)
    for name, key in (("encode", "vs_process_pool"), ("decode", "decode_vs_process_pool")):
        if detail := report.get("details", {}).get(key):
            note = f"{detail['items']:,} JPEGs 512² to 224²{' and a ResNet-18' if name == 'encode' else ''}: the job on {cores} cores"
            value = detail["mim_ray_items_per_s"] / cores
            rates[f"{name}_items_per_s_per_core"] = {"value": value, "unit": "items/s", "note": note}
    return rates


def _source(report: dict[str, Any]) -> str:
    machine = report.get("machine", {})
    busy = max(machine.get("load_average", [0.0])[:1]) > max(1, machine.get("threads", 1)) + 0.5
    parts = [
        f"{machine.get('cpu', 'machine not told')}, {machine.get('cpus', '?')} cores",
        str(machine.get("measured_at", "date not told"))[:10],
        " ".join(Path(word).name if word.startswith("/") else word for word in machine.get("command", "?").split()),
        f"commit {machine.get('git_commit', '?')}",
    ]
    return ", ".join([*parts, *(["the machine was busy with other work"] if busy else [])])
