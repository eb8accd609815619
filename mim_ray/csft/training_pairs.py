"""Which rows of the pairs table a run trains on, and how many of them each item has. No torch.

The samples stage writes pairs from before the validation start only, so the counts know no more than training does.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray import artifacts
from mim_ray.config.scenario import Csft
from mim_ray.data.batches import ordered_batches
from mim_ray.data.catalogue import Catalogue
from mim_ray.data.ids import hash_ids, mix

CHOICE_COLUMNS = ["item_id", "signal", "timestamp", "user_id"]
_SCAN_ROWS = 65_536
_FILE = "counts.npy"


def chosen(table: pa.Table, settings: Csft, *, held_out: bool) -> np.ndarray:
    """(n,) bool, the rows of `table` (CHOICE_COLUMNS and others) of the wanted signal that are, or are not, held out.

    A pair is held out by a hash of user, item and time.
    """
    time = np.asarray(table.column("timestamp").cast(pa.int64()).fill_null(0)).astype(np.uint64)
    key = mix(hash_ids(table.column("user_id")) ^ mix(hash_ids(table.column("item_id")) ^ mix(time)))
    wanted: np.ndarray = ((key >> np.uint64(11)).astype(np.float64) * 2.0**-53 < settings.held_out_ratio) == held_out
    if settings.pair_signal != "any":
        wanted &= np.asarray(pc.fill_null(pc.equal(table.column("signal"), settings.pair_signal), False))
    return wanted


def pair_counts(pairs: str, catalogue: Catalogue, settings: Csft) -> np.ndarray:
    """(num_items,) int64 training pairs of each item in the table at a URI."""
    counts = np.zeros(catalogue.num_items, np.int64)
    for table in ordered_batches(pairs, CHOICE_COLUMNS, _SCAN_ROWS):
        items = table.column("item_id").filter(pa.array(chosen(table, settings, held_out=False)))
        rows = catalogue.rows(items)
        counts += np.bincount(rows[rows >= 0], minlength=len(counts))
    return counts


def save_counts(uri: str, counts: np.ndarray) -> None:
    sink = io.BytesIO()
    np.save(sink, counts, allow_pickle=False)
    artifacts.write_bytes(f"{uri}/{_FILE}", sink.getvalue())


def open_counts(uri: str) -> np.ndarray:
    """What `save_counts` left, mapped from the disk."""
    counts: np.ndarray = np.load(artifacts.local_copy(uri) / _FILE, mmap_mode="r")
    return counts
