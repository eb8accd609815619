import numpy as np

from mim_ray.representation_center.row_index import RowIndex


def hashes_of(keys: np.ndarray) -> np.ndarray:
    """Three keys share each hash, and hash 0 occurs."""
    return (keys.astype(np.uint64) // np.uint64(3)) * np.uint64(0x9E3779B97F4A7C15)


def test_it_agrees_with_a_dictionary_whatever_is_inserted_and_however_hashes_collide() -> None:
    rng = np.random.default_rng(0)
    for batch in (3, 200, 3_000):
        index, truth, keys = RowIndex(), {}, np.empty(0, np.int64)
        for _ in range(30):
            new = rng.integers(0, 4_000, int(rng.integers(1, batch + 1)))
            rows = np.arange(len(keys), len(keys) + len(new))
            keys = np.append(keys, new)
            index.insert(hashes_of(new), rows, lambda row, at, keys=keys, new=new: keys[row] == new[at])
            truth.update(zip(new.tolist(), rows.tolist(), strict=True))
        asked = np.arange(4_100)
        found = index.find(hashes_of(asked), lambda row, at, keys=keys, asked=asked: keys[row] == asked[at])
        assert found.tolist() == [truth.get(key, -1) for key in asked.tolist()]
        assert len(index) == len(truth)


def test_an_empty_question_and_an_empty_index_have_answers() -> None:
    index = RowIndex()
    nothing = np.empty(0, np.int64)
    assert index.find(hashes_of(np.arange(4)), lambda row, at: row == at).tolist() == [-1] * 4
    index.insert(hashes_of(nothing), nothing, lambda row, at: row == at)
    assert (len(index), len(index.find(hashes_of(nothing), lambda row, at: row == at))) == (0, 0)
