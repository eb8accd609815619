"""The behaviors of the user's own impressions, put in order: past ones only, oldest first, the newest of them kept."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mim_ray.config.scenario import Samples
from mim_ray.data.event_log import UNKNOWN_TIME, times_us
from mim_ray.data.schema import TIME
from mim_ray.data.user_samples import cutoffs


def past_behaviors(
    behaviors: pa.ChunkedArray, behavior_times: pa.ChunkedArray, at: np.ndarray, settings: Samples
) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """Clean the behaviors of n impressions.

    Times can be used where a row gives one for each behavior. There, behaviors that are not from before the impression
    are dropped and the others sorted by time. Elsewhere the order is taken as it is and the row's times become null.

    Args:
        behaviors: n lists of item ids; a null list is an empty one. behavior_times: n lists of TIME.
        at: (n,) microseconds of the impressions, UNKNOWN_TIME where there is none (nothing counts as future then).

    Returns:
        the two columns, with the newest `samples.max_behaviors` of each row, and counts of what was put right.
    """
    sizes, items = _flat(behaviors)
    time_sizes, time_values = _flat(behavior_times)
    times = times_us(time_values)
    with_null = np.bincount(_rows(time_sizes)[times == UNKNOWN_TIME], minlength=len(at)) > 0
    timed = (sizes == time_sizes) & ~with_null & np.asarray(behavior_times.is_valid())
    row = _rows(sizes)
    time = np.zeros(len(row), np.int64)
    time[timed[row]] = times[timed[_rows(time_sizes)]]

    cutoff = np.where(at == UNKNOWN_TIME, at, cutoffs(at, settings.time_resolution))
    past = ~timed[row] | (time < cutoff[row])
    unsorted = np.zeros(len(at), bool)
    unsorted[row[1:][(np.diff(time) < 0) & (row[1:] == row[:-1])]] = True
    order = np.lexsort((time, row)) if unsorted.any() else np.arange(len(row))
    order = order[past[order]]

    kept = np.bincount(row[order], minlength=len(at))
    newest = np.minimum(kept, settings.max_behaviors)
    ends = np.cumsum(kept)
    offsets = np.concatenate([[0], np.cumsum(newest)])
    place = order[np.arange(offsets[-1]) - np.repeat(offsets[:-1], newest) + np.repeat(ends - newest, newest)]
    starts = pa.array(offsets.astype(np.int32))
    columns = {
        "behaviors": pa.ListArray.from_arrays(starts, items.take(pa.array(place))),
        "behavior_times": pa.ListArray.from_arrays(starts, pa.array(time[place]).cast(TIME), mask=pa.array(~timed)),
    }
    counts = {
        "future behaviors dropped": int((~past).sum()),
        "impressions with unsorted behaviors": int(unsorted.sum()),
        "impressions without usable behavior times": int((~timed & (sizes > 0)).sum()) if timed.any() else 0,
    }
    return columns, {name: count for name, count in counts.items() if count}


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(n,) lengths, 0 for null, and all values one after the other."""
    array = lists.combine_chunks()
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    return np.asarray(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64), array.flatten()


def _rows(sizes: np.ndarray) -> np.ndarray:
    """The row of each value of lists of these lengths."""
    return np.repeat(np.arange(len(sizes)), sizes)
