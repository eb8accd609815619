"""Scale on paper: what a catalogue of some size costs, from measured rates; docs/scale.md tells the model in words.

    figures = plan(Needs(items=1.42e9, width=128, gpu_rate=2_000, gpus=40), load_rates())

Every figure says what it is made of: measured rates, what the user gave, assumptions. What is neither measured nor given is
missing, never guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mim_ray.pipeline.rates import Rate

PAPER_BYTES = 300e9
PAPER_ITEMS = 1.42e9
COMPACTED_FILE_BYTES = 256 * 2**20
FAN_IN = 4


@dataclass(frozen=True)
class Needs:
    """What the user wants to know about. None: not given.

    Attributes:
        core_rate, gpu_rate: items per second that one core, or one GPU, encodes with the user's encoder.
        change_ratio: part of the items that is new or changed in a day.
        kept_snapshots: states of the snapshot that stay for a roll-back. replicas: copies that parameter machines hold.
        price: of a GB (10^9 bytes) stored for a month; gpu_price, core_price: of an hour.
        commit_s: seconds of a commit in an empty log on the user's store (object stores: some requests).
    """

    items: float
    width: int = 128
    dtype: str = "float16"
    core_rate: float | None = None
    gpu_rate: float | None = None
    cores: float | None = None
    gpus: float | None = None
    shard_rows: int = 1_024
    commit_every_s: float = 5.0
    change_ratio: float = 0.01
    kept_snapshots: int = 3
    replicas: int = 2
    machine_memory_gb: float | None = None
    price: float | None = None
    gpu_price: float | None = None
    core_price: float | None = None
    commit_s: float | None = None


@dataclass(frozen=True)
class Figure:
    """A line of the plan. `value` None: missing, and `basis` says what would give it."""

    group: str
    name: str
    value: float | None
    unit: str
    basis: str


class _Book:
    """Looks values up and remembers which were used."""

    def __init__(self, needs: Needs, rates: dict[str, Rate]) -> None:
        self.needs, self._rates = needs, rates
        self.used: dict[str, Rate] = {}
        self.figures: list[Figure] = []

    def rate(self, name: str) -> float | None:
        if name not in self._rates:
            return None
        self.used[name] = self._rates[name]
        return self._rates[name].value

    def add(self, group: str, name: str, value: float | None, unit: str, basis: str) -> float | None:
        self.figures.append(Figure(group, name, value, unit, basis))
        return value


def plan(needs: Needs, rates: dict[str, Rate]) -> tuple[list[Figure], dict[str, Rate]]:
    """The figures, and the measured rates that they use."""
    book = _Book(needs, rates)
    hours = _encoding(book)
    log_bytes, snapshot_bytes = _storage(book)
    _log(book, hours)
    _serving(book)
    _refresh(book, log_bytes)
    _prices(book, log_bytes, snapshot_bytes)
    return book.figures, book.used


def _encoding(book: _Book) -> float | None:
    """Hours of the full extraction, where they are known."""
    needs, group = book.needs, "Encoding all items (MFM)"
    measured = book.rate("encode_items_per_s_per_core") if needs.core_rate is None else None
    core_rate = needs.core_rate if needs.core_rate is not None else measured
    if core_rate is None:
        basis = "missing: give --core-rate, or --rates with the result of benchmarks/scale.py"
    else:
        basis = "items ÷ --core-rate (yours)" if measured is None else "items ÷ encode_items_per_s_per_core (measured)"
    core_hours = book.add(group, "core-hours, on CPUs only", _hours(needs.items, core_rate), "h", basis)
    hours = None
    if needs.cores is not None:
        hours = _divided(core_hours, needs.cores)
        book.add(
            group, f"hours with {needs.cores:,.0f} cores", hours, "h", f"{basis} ÷ --cores; assumed: linear in cores"
        )
    missing = "missing: give --gpu-rate, items/s of one GPU with your encoder; no GPU was ever measured here"
    basis = missing if needs.gpu_rate is None else "items ÷ --gpu-rate (yours)"
    gpu_hours = book.add(group, "GPU-hours", _hours(needs.items, needs.gpu_rate), "h", basis)
    if needs.gpus is not None:
        on_gpus = _divided(gpu_hours, needs.gpus)
        hours = on_gpus if on_gpus is not None else hours
        book.add(
            group, f"hours with {needs.gpus:,.0f} GPUs", on_gpus, "h", f"{basis} ÷ --gpus; assumed: linear in GPUs"
        )
    decode = book.rate("decode_items_per_s_per_core")
    feeding = None if decode is None or needs.gpu_rate is None else needs.gpu_rate / decode
    basis = (
        "--gpu-rate ÷ decode_items_per_s_per_core (measured)"
        if decode is not None
        else "missing: decode_items_per_s_per_core"
    )
    book.add(group, "cores that decode for one GPU", feeding, "cores", basis if needs.gpu_rate is not None else missing)
    return hours


def _storage(book: _Book) -> tuple[float | None, float | None]:
    """Bytes of the log and of one snapshot."""
    needs, group = book.needs, "Storage"
    log = _bytes(book, "log_compacted_bytes")
    snapshot = _bytes(book, f"snapshot_{needs.dtype}_bytes")
    width = f"fixed + {needs.width} values (measured, linear in the width)"
    book.add(group, "log, bytes per item", log, "B", f"log_compacted_bytes: {width}; vectors without redundancy")
    book.add(
        group, f"snapshot, bytes per item in {needs.dtype}", snapshot, "B", f"snapshot_{needs.dtype}_bytes: {width}"
    )
    log_bytes, snapshot_bytes = _times(log, needs.items), _times(snapshot, needs.items)
    book.add(group, "log", _times(log_bytes, 1e-9), "GB", "bytes per item × items")
    basis = "the log twice: files replaced by a compaction stay until the retention is over (assumed: the worst)"
    book.add(group, "log at most", _times(log_bytes, 2e-9), "GB", basis)
    basis = f"bytes per item × items × {needs.kept_snapshots} states kept"
    book.add(group, "snapshots", _times(snapshot_bytes, needs.kept_snapshots * 1e-9), "GB", basis)
    return log_bytes, snapshot_bytes


def _log(book: _Book, hours: float | None) -> None:
    """Shards, commits, compaction, snapshot."""
    needs, group = book.needs, "Log and snapshot"
    shards = math.ceil(needs.items / needs.shard_rows)
    book.add(group, "shards", float(shards), "", f"items ÷ {needs.shard_rows:,} rows")
    commits = None if hours is None else max(1.0, min(shards, hours * 3_600 / needs.commit_every_s))
    basis = "missing: hours of the extraction (--cores or --gpus)"
    if commits is not None:
        basis = f"hours of the extraction, one commit every {needs.commit_every_s:g} s, at most one per shard"
    book.add(group, "commits", commits, "", basis)
    fixed = needs.commit_s if needs.commit_s is not None else book.rate("commit_s")
    per_file, opening = book.rate("commit_s_per_file"), book.rate("open_log_s_per_file")
    told = "--commit-s (yours)" if needs.commit_s is not None else "commit_s (measured on a local disk)"
    log = _bytes(book, "log_compacted_bytes")
    files = None if log is None else max(1.0, needs.items * log / COMPACTED_FILE_BYTES)
    book.add(group, "files of the compacted log", files, "", f"its bytes ÷ {COMPACTED_FILE_BYTES / 2**20:.0f} MiB")
    for name, number in (("compacted", files), ("never compacted", float(shards))):
        each = None if fixed is None or per_file is None or number is None else fixed + per_file * number
        basis = f"{told} + commit_s_per_file × {number or 0:,.0f} files (measured, linear in the files)"
        book.add(group, f"one commit, log {name}", each, "s", basis)
        basis = f"open_log_s_per_file × {number or 0:,.0f} files (measured, linear in the files)"
        book.add(group, f"opening the log, {name}", _times(opening, number), "s", basis)
    rewrites = None if commits is None else max(1.0, math.ceil(math.log(max(commits, 2.0), FAN_IN)))
    basis = f"log of the commits to the base {FAN_IN}: a merge takes {FAN_IN} runs (counted: 2, 3, 4 at 16, 64, 256 commits)"
    book.add(group, "times a row is rewritten by compaction", rewrites, "", basis)
    compaction = _hours(_times(rewrites, needs.items), book.rate("compaction_rows_per_s"))
    book.add(
        group, "compaction, core-hours in all", compaction, "h", "items × rewrites ÷ compaction_rows_per_s (measured)"
    )
    build = _hours(needs.items, book.rate("build_rows_per_s"))
    basis = "items ÷ build_rows_per_s (measured, with rows spilled to disk; assumed: linear)"
    book.add(group, "building a snapshot, one process", build, "h", basis)


def _serving(book: _Book) -> None:
    """Memory of the parameter machines."""
    needs, group = book.needs, "Parameter machines (CMD)"
    item = _bytes(book, f"mapped_{needs.dtype}_bytes")
    basis = f"mapped_{needs.dtype}_bytes: index, vector and time (measured, linear in the width)"
    book.add(group, "mapped bytes per item", item, "B", basis)
    book.add(group, "the paper's bytes per item", PAPER_BYTES / PAPER_ITEMS, "B", "300 GB ÷ 1.42 B items (Section 3.5)")
    copy = _times(item, needs.items)
    book.add(group, "one copy of the table", _times(copy, 1e-9), "GB", "mapped bytes per item × items")
    basis = "300 GB × items ÷ 1.42 B: the paper's table at this number of items"
    book.add(group, "the paper's table", PAPER_BYTES * needs.items / PAPER_ITEMS / 1e9, "GB", basis)
    total = book.add(
        group, f"{needs.replicas} replicas", _times(copy, needs.replicas * 1e-9), "GB", "one copy × --replicas"
    )
    if needs.machine_memory_gb is not None:
        machines = None if total is None else math.ceil(total / (0.8 * needs.machine_memory_gb))
        basis = (
            "replicas ÷ 80 % of --machine-memory-gb (assumed: 20 % for the overlay, dense parameters and the system)"
        )
        book.add(group, "machines", None if machines is None else float(machines), "", basis)


def _refresh(book: _Book, log_bytes: float | None) -> None:
    """A day's changes."""
    needs = book.needs
    group = f"A day's refresh ({needs.change_ratio:.2%} of the items)"
    changed = needs.items * needs.change_ratio
    book.add(group, "items", changed, "", "items × --change-ratio")
    book.add(group, "GPU-hours", _hours(changed, needs.gpu_rate), "h", "changed items ÷ --gpu-rate (yours), or missing")
    core_rate = needs.core_rate if needs.core_rate is not None else book.rate("encode_items_per_s_per_core")
    book.add(
        group,
        "core-hours, on CPUs only",
        _hours(changed, core_rate),
        "h",
        "changed items ÷ the rate of one core, or missing",
    )
    written = _times(log_bytes, needs.change_ratio * 1e-9)
    book.add(group, "appended to the log", written, "GB", "log × --change-ratio, before compaction")


def _prices(book: _Book, log_bytes: float | None, snapshot_bytes: float | None) -> None:
    needs, group = book.needs, "Money, at the prices you gave"
    if needs.price is not None:
        stored = None
        if log_bytes is not None and snapshot_bytes is not None:
            stored = (2 * log_bytes + needs.kept_snapshots * snapshot_bytes) / 1e9 * needs.price
        basis = "(log at most + snapshots) × --price (yours)"
        book.add(group, "storage per month", stored, "", basis)
    for price, rate, name in ((needs.gpu_price, needs.gpu_rate, "gpu"), (needs.core_price, needs.core_rate, "core")):
        if price is None:
            continue
        if name == "core" and rate is None:
            rate = book.rate("encode_items_per_s_per_core")
        cost = _times(_hours(needs.items, rate), price)
        book.add(
            group, f"encoding all items on {name}s", cost, "", f"{name}-hours × --{name}-price (yours), or missing"
        )


def check(needs: Needs) -> list[str]:
    """What is wrong with the user's numbers, a sentence each."""
    problems = []
    for field in fields(needs):
        value = getattr(needs, field.name)
        if isinstance(value, float | int) and not (math.isfinite(value) and value > 0):
            problems.append(f"--{field.name.replace('_', '-')} = {value:g} must be a number above 0.")
    if needs.change_ratio > 1:
        problems.append(f"--change-ratio = {needs.change_ratio:g} must be at most 1: it is a part of the items.")
    return problems


def _bytes(book: _Book, name: str) -> float | None:
    fixed, per_value = book.rate(f"{name}_fixed"), book.rate(f"{name}_per_value")
    return None if fixed is None or per_value is None else fixed + per_value * book.needs.width


def _hours(items: float | None, rate: float | None) -> float | None:
    return None if items is None or rate is None else items / rate / 3_600


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _divided(value: float | None, by: float) -> float | None:
    return None if value is None else value / by
