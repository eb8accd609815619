"""Training batches from Parquet as a function of (seed, epoch, step, rank, world), whatever else the machine does.

Units (row groups, or slices of at most 2,048 rows of them) are put in an order drawn from (seed, epoch). The rows of all
units in that order form one sequence of N rows; rank r of P has its r-th contiguous part of N // P rows, so all ranks
have equally many steps. Inside its part a rank shuffles rows within windows of a few units (16,384 rows or 256 MB).
Skipping to a step reads no window before it. A rank leaves out the rows that fill no batch, other ones in every epoch.

Ray Data's streaming_split gives no order, which is why this is here (SPEC 4.7).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mim_ray import artifacts
from mim_ray.errors import DataError

UNIT_ROWS = 2_048
_WINDOW_ROWS = 16_384
_WINDOW_BYTES = 256 * 2**20
_PREFETCH = 3
T = TypeVar("T")


@dataclass(frozen=True)
class _Unit:
    file: str
    row_group: int
    start: int
    num_rows: int
    row_bytes: int


class RowBatches:
    """Batches of rows of one split for one rank.

    Args:
        source: URI of a Parquet file or a folder of them, or a list of files.
        columns: what to read; None for all.
        batch_size: B, rows per rank and step; smaller where the split has fewer rows than one batch for every rank.
        prepare: done to the rows of a window at once when they are read. It must treat each row alone, so that a batch does
            not depend on the window that it comes from.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        columns: Sequence[str] | None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prepare: Callable[[pa.Table], pa.Table] | None = None,
    ) -> None:
        assert 0 <= rank < world
        assert batch_size > 0
        self._source = source if isinstance(source, str) else f"{len(source)} files"
        self._columns = list(columns) if columns is not None else None
        self._units = _units(_parquet_files(source), self._columns)
        self.num_rows = sum(unit.num_rows for unit in self._units)
        self._rank_rows = min(self.num_rows, max(1, self.num_rows // world))
        self.batch_size = max(1, min(batch_size, self._rank_rows))
        self.steps_per_epoch = self._rank_rows // self.batch_size
        self._seed, self._rank, self._prepare = seed, rank, prepare
        self._windows: list[list[_Unit]] = []
        self._windows_of = -1
        self._read_windows: dict[tuple[int, int], tuple[pa.Table, np.ndarray]] = {}

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[pa.Table]:
        """The batches of one epoch from `start_step` on, read ahead in a background thread."""
        return prefetch(self._epoch(epoch, start_step))

    def steps(self, num_steps: int, start_step: int = 0) -> Iterator[pa.Table]:
        """Batches `start_step` to `num_steps` - 1 of a run that goes through as many epochs as that takes.

        Raises:
            DataError: there are no rows at all.
        """
        if not self.num_rows:
            raise DataError(
                f"{self._source} has no rows to train on. See the summary of the samples stage for what was rejected, "
                "and samples.positive_events and samples.pair_events for which events count."
            )
        return prefetch(self._steps(num_steps, start_step))

    def _steps(self, num_steps: int, step: int) -> Iterator[pa.Table]:
        while step < num_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            for batch in self._epoch(epoch, first):
                yield batch
                step += 1
                if step == num_steps:
                    return

    def batch(self, epoch: int, step: int) -> pa.Table:
        """Batch `step` of an epoch, whatever was asked for before; the last two windows read stay in memory."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        if self._windows_of != epoch:
            self._windows_of, self._windows = epoch, list(_windows(self._part(epoch)))
        pieces, first = [], 0
        for number, window in enumerate(self._windows):
            num_rows = sum(unit.num_rows for unit in window)
            low, high = max(start, first), min(stop, first + num_rows)
            if low < high:
                table, order = self._window(epoch, number)
                pieces.append(table.take(pa.array(order[low - first : high - first])))
            first += num_rows
        return pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces).combine_chunks()

    def _epoch(self, epoch: int, start_step: int) -> Iterator[pa.Table]:
        for step in range(start_step, self.steps_per_epoch):
            yield self.batch(epoch, step)

    def _window(self, epoch: int, number: int) -> tuple[pa.Table, np.ndarray]:
        """Rows of a window as they lie in the files, prepared, and the order drawn for them."""
        if (epoch, number) not in self._read_windows:
            if len(self._read_windows) > 1:
                self._read_windows.pop(next(iter(self._read_windows)))
            groups: dict[tuple[str, int], pa.Table] = {}
            table = pa.concat_tables([self._read(unit, groups) for unit in self._windows[number]]).combine_chunks()
            table = table if self._prepare is None else self._prepare(table)
            order = np.random.default_rng([self._seed, epoch, self._rank, number]).permutation(table.num_rows)
            self._read_windows[epoch, number] = (table, order)
        return self._read_windows[epoch, number]

    def _part(self, epoch: int) -> list[_Unit]:
        """This rank's units in the epoch's order, the first and last ones cut where the part begins and ends."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._units))
        start = self._rank * self._rank_rows % max(1, self.num_rows)  # wraps only when rows are fewer than ranks
        stop = start + self._rank_rows
        part, first = [], 0
        for unit in (self._units[i] for i in order):
            low, high = max(start, first), min(stop, first + unit.num_rows)
            if low < high:
                part.append(_Unit(unit.file, unit.row_group, unit.start + low - first, high - low, unit.row_bytes))
            first += unit.num_rows
        return part

    def _read(self, unit: _Unit, groups: dict[tuple[str, int], pa.Table]) -> pa.Table:
        """Its rows; `groups` keeps the row groups of a window that were read, for units that share one."""
        key = (unit.file, unit.row_group)
        if key not in groups:
            with _open(unit.file) as file:
                groups[key] = file.read_row_group(unit.row_group, columns=self._columns)
        return groups[key].slice(unit.start, unit.num_rows)


def ordered_batches(
    source: str | Sequence[str], columns: Sequence[str] | None, batch_size: int, read_ahead: bool = True
) -> Iterator[pa.Table]:
    """Every row in file order, for prediction; the last batch may be smaller."""

    def batches() -> Iterator[pa.Table]:
        rest: list[pa.Table] = []
        num_rest = 0
        for file in _parquet_files(source):
            with _open(file) as parquet:
                for piece in parquet.iter_batches(batch_size, columns=list(columns) if columns is not None else None):
                    rest.append(pa.Table.from_batches([piece]))
                    num_rest += piece.num_rows
                    if num_rest >= batch_size:
                        joined = pa.concat_tables(rest).combine_chunks()
                        yield joined.slice(0, batch_size)
                        rest, num_rest = [joined.slice(batch_size)], num_rest - batch_size
        if num_rest:
            yield pa.concat_tables(rest).combine_chunks()

    return prefetch(batches()) if read_ahead else batches()


def num_rows(source: str | Sequence[str]) -> int:
    """Rows of a Parquet file, folder or list of files, from their footers."""
    return sum(unit.num_rows for unit in _units(_parquet_files(source), None))


def prefetch(items: Iterator[T], depth: int = _PREFETCH) -> Iterator[T]:
    """The same items, made up to `depth` ahead in a thread that ends with the consumer."""
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:  # noqa: BLE001  (raised again in the consumer)
            put((None, error, True))

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def _parquet_files(source: str | Sequence[str]) -> list[str]:
    if not isinstance(source, str):
        return list(source)
    files = artifacts.list_files(source, ".parquet")
    if not files:
        raise DataError(f"{source} holds no Parquet file. Run the stage that writes it first.")
    return files


def _open(uri: str) -> pq.ParquetFile:
    filesystem, path = artifacts.filesystem(uri)
    return pq.ParquetFile(path, filesystem=filesystem)


def _units(files: list[str], columns: list[str] | None) -> list[_Unit]:
    def of_file(file: str) -> list[_Unit]:
        with _open(file) as parquet:
            metadata = parquet.metadata
        units = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            chunks = [group.column(i) for i in range(group.num_columns)]
            used = [c for c in chunks if columns is None or c.path_in_schema.split(".")[0] in columns]
            row_bytes = sum(c.total_uncompressed_size for c in used) // max(1, group.num_rows)
            units += [
                _Unit(file, number, start, min(UNIT_ROWS, group.num_rows - start), row_bytes)
                for start in range(0, group.num_rows, UNIT_ROWS)
            ]
        return units

    with ThreadPoolExecutor(8) as pool:
        return [unit for units in pool.map(of_file, files) for unit in units]


def _windows(units: list[_Unit]) -> Iterator[list[_Unit]]:
    window: list[_Unit] = []
    rows = size = 0
    for unit in units:
        unit_bytes = unit.num_rows * unit.row_bytes
        if window and (rows + unit.num_rows > _WINDOW_ROWS or size + unit_bytes > _WINDOW_BYTES):
            yield window
            window, rows, size = [], 0, 0
        window.append(unit)
        rows, size = rows + unit.num_rows, size + unit_bytes
    if window:
        yield window
