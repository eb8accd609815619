"""mim_ray/extraction/feed_changes.py: what the change data feed tells equals what the files say."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from mim_ray.data.change_feed import FeedUnusableError
from mim_ray.data.rejects import read_rejects
from mim_ray.data.schema import ITEMS
from mim_ray.extraction import feed_changes
from mim_ray.extraction.catalogue_state import CatalogueState, PackWriter, SeenFile, StateStore
from mim_ray.extraction.feed_changes import Events, last_events
from mim_ray.extraction.records import Records
from mim_ray.extraction.refresh import Refresher, Round
from mim_ray.extraction.scanners import Scanners
from mim_ray.representation_center.snapshot import Snapshot

FEED = {"delta.enableChangeDataFeed": "true"}


def items_of(ids: list[str | None], text: str, **columns: list[Any]) -> pa.Table:
    """Items, without pictures."""
    values = {"item_id": ids, "title": [f"{text} {item}" for item in ids], "category": ["c"] * len(ids)}
    values |= {"image": [None] * len(ids)} | columns
    return pa.table({name: pa.array(value, ITEMS.schema.field(name).type) for name, value in values.items()})


def found(done: Round) -> tuple[int, int, int, int]:
    return done.new, done.changed, done.deleted, done.unchanged


def current(refresher: Refresher) -> dict[str, tuple[str, list[float]]]:
    """Hash and vector of every item, which the snapshot shows too."""
    rows = refresher.table.current_rows("v1")
    assert Snapshot.open(refresher.line).num_rows == rows.num_rows
    columns = (rows[name].to_pylist() for name in ("item_id", "content_hash", "embedding"))
    return {item: (content, np.round(vector, 4).tolist()) for item, content, vector in zip(*columns, strict=True)}


def rejected(refresher: Refresher) -> list[tuple[str, str]]:
    rows = read_rejects(f"{Path(refresher.table.uri).parent}-rejects", "refresh")
    return sorted(zip(rows["key"].to_pylist(), rows["reason"].to_pylist(), strict=True))


def round_by_files(refresher: Refresher, patched: pytest.MonkeyPatch) -> Round:
    def off(*_: Any) -> Any:
        raise FeedUnusableError("switched off by the test")

    with patched.context() as patch:
        patch.setattr(feed_changes, "read_feed", off)
        return refresher.round()


class History:
    """Random commits to a catalogue without two rows of one id."""

    def __init__(self, uri: str, seed: int, png: bytes) -> None:
        self.uri, self.random, self.count, self.png = uri, random.Random(seed), 60, png
        self.ids = [f"i{number}" for number in range(self.count)]
        write_deltalake(uri, items_of([*self.ids], "first"), configuration=FEED, target_file_size=1_000)

    def step(self) -> str:
        """One commit or a few, of a kind that is drawn."""
        kinds = [self.add, self.change, self.upsert, self.delete, self.again, self.rename, self.move, self.spoil]
        chosen = self.random.choices([*kinds, self.restore, self.overwrite], [4] * len(kinds) + [1, 1])[0]
        chosen()
        return chosen.__name__

    def some(self, most: int) -> list[str]:
        return self.random.sample(self.ids, min(len(self.ids), self.random.randint(1, most)))

    def fresh(self, most: int) -> list[str]:
        first, self.count = self.count, self.count + self.random.randint(1, most)
        return [f"i{number}" for number in range(first, self.count)]

    def text(self) -> str:
        return self.random.choice(["first", "second", f"text {self.random.random()}"])  # earlier content comes again

    def write(self, rows: pa.Table) -> None:
        write_deltalake(self.uri, rows, mode="append")

    def table(self) -> DeltaTable:
        return DeltaTable(self.uri)

    def add(self) -> None:
        new = self.fresh(5)
        self.write(items_of([*new], self.text()))
        self.ids += new

    def change(self) -> None:
        for item in self.some(3):
            values = {"title": self.text()} if self.random.random() < 0.7 else {"category": "another"}
            self.table().update(predicate=f"item_id = '{item}'", new_values=values)

    def upsert(self) -> None:
        new = self.fresh(3)
        merge = self.table().merge(items_of([*self.some(8), *new], self.text()), "t.item_id = s.item_id", "s", "t")
        merge.when_matched_update_all().when_not_matched_insert_all().execute()
        self.ids += new

    def delete(self) -> None:
        gone = self.some(4)
        names = ", ".join(f"'{item}'" for item in gone)
        self.table().delete(f"item_id in ({names})")
        self.ids = [item for item in self.ids if item not in gone]

    def again(self) -> None:
        """Deleted, and there again, once or twice."""
        item = self.some(1)[0]
        for _ in range(self.random.randint(1, 2)):
            self.table().delete(f"item_id = '{item}'")
            self.write(items_of([item], self.text()))

    def rename(self) -> None:
        old, new = self.some(1)[0], self.fresh(1)[0]
        self.table().update(predicate=f"item_id = '{old}'", new_values={"item_id": new})
        self.ids = [new if item == old else item for item in self.ids]

    def move(self) -> None:
        self.table().optimize.compact()

    def spoil(self) -> None:
        """Rows without usable content, or with a picture that may be one."""
        images = [self.random.choice([b"broken", self.png, None]) for _ in range(3)]
        titles = [self.random.choice([None, "kept"]) for _ in range(3)]
        rows = items_of([*self.random.sample(self.ids, 3)], "", title=titles, image=images)
        merge = self.table().merge(rows, "t.item_id = s.item_id", "s", "t")
        merge.when_matched_update({"title": "s.title", "image": "s.image"}).execute()

    def restore(self) -> None:
        table = self.table()
        table.restore(max(0, table.version() - 2))
        self.ids = self.table().to_pyarrow_table(columns=["item_id"])["item_id"].to_pylist()

    def overwrite(self) -> None:
        rows = self.table().to_pyarrow_table()
        write_deltalake(self.uri, rows, mode="overwrite")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("seed", range(4))
def test_rounds_by_feed_equal_rounds_by_files_and_a_whole_comparison(
    tmp_path: Path, start: Any, picture: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    uri = f"{tmp_path}/items"
    history = History(uri, seed, picture(1))
    feed, files = start(uri, max_deleted_ratio=1.0), start(uri, center="files", max_deleted_ratio=1.0)
    feed.round(), files.round()
    by_feed = 0
    for _ in range(7):
        steps = [history.step() for _ in range(history.random.randint(1, 4))]
        crash = history.random.random() < 0.3
        if crash:  # after the commit, before the note
            with monkeypatch.context() as patch:
                patch.setattr(StateStore, "write", _fail)
                with pytest.raises(OSError, match="full"):
                    feed.round()
            feed.__exit__(None, None, None)
            feed = start(uri, max_deleted_ratio=1.0)
            if "restore" not in steps:  # then what the killed round encoded goes before it is noted
                history.delete()
        done, expected = feed.round(), round_by_files(files, monkeypatch)
        by_feed += not done.notes
        if not crash:
            assert (found(done), done.rejected) == (found(expected), expected.rejected), steps
        assert current(feed) == current(files), steps
        assert rejected(feed) == rejected(files), steps
    assert by_feed
    whole = start(uri, center="whole")
    whole.round()
    assert current(feed) == current(whole)
    assert found(round_by_files(feed, monkeypatch))[:3] == (0, 0, 0)


def _fail(*_: Any) -> None:
    raise OSError("the disk is full")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_only_rows_that_changed_are_looked_at(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, ids = f"{tmp_path}/items", [f"i{number}" for number in range(100)]
    write_deltalake(uri, items_of(ids[:50], "first"), configuration=FEED)
    write_deltalake(uri, items_of(ids[50:], "first"), mode="append")
    refresher = start(uri)
    refresher.round()
    looked: list[int] = []
    original = Scanners.scan

    def counted(self: Scanners, slices: Any, *arguments: Any) -> Any:
        looked.append(sum(part.num_rows for part in slices))
        return original(self, slices, *arguments)

    monkeypatch.setattr(Scanners, "scan", counted)
    for text in ("second", "third"):
        merge = DeltaTable(uri).merge(items_of(ids[:3], text), "t.item_id = s.item_id", "s", "t")
        merge.when_matched_update_all().execute()
    done = refresher.round()
    assert (found(done), done.notes, looked) == ((0, 3, 0, 97), (), [3])
    DeltaTable(uri).optimize.compact()
    done = refresher.round()
    assert (found(done), done.notes, looked) == ((0, 0, 0, 100), (), [3, 0])


def switch(uri: str, on: str) -> None:
    DeltaTable(uri).alter.set_table_properties({"delta.enableChangeDataFeed": on})


def vacuum(uri: str) -> None:
    DeltaTable(uri).delete("item_id = 'i9'")
    DeltaTable(uri).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)


def drop_log(uri: str) -> None:
    table = DeltaTable(uri)
    table.delete("item_id = 'i9'")
    table.create_checkpoint()
    Path(f"{uri}/_delta_log/{1:020}.json").unlink()


def widen(uri: str) -> None:
    rows = items_of(["more"], "second").append_column("price", pa.array([1.0]))
    write_deltalake(uri, rows, mode="append", schema_mode="merge")


FALLBACKS: dict[str, tuple[Callable[[str], Any], str]] = {
    "off": (lambda uri: switch(uri, "false"), "the catalogue's change data feed is off"),
    "vacuumed": (vacuum, "files of version 1 are gone"),
    "log dropped": (drop_log, "its log does not reach back to version 0"),
    "schema": (widen, "version 2 changed the table's schema"),
    "restored": (lambda uri: DeltaTable(uri).restore(0), "restored an older one"),
    "twice": (
        lambda uri: write_deltalake(uri, items_of(["i5"], "second"), mode="append"),
        "1 of the changed items stood",
    ),
    "no id": (lambda uri: write_deltalake(uri, items_of([None], "second"), mode="append"), "without an item_id"),
}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("case", FALLBACKS)
def test_what_the_feed_does_not_tell_is_found_by_the_files_and_said(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    uri, ids = f"{tmp_path}/items", [f"i{number}" for number in range(10)]
    write_deltalake(uri, items_of([*ids], "first"), configuration=FEED)
    feed, files = start(uri, max_deleted_ratio=1.0), start(uri, center="files", max_deleted_ratio=1.0)
    feed.round(), files.round()
    DeltaTable(uri).update(predicate="item_id in ('i1', 'i2')", new_values={"title": "changed"})
    if case not in ("vacuumed", "log dropped"):  # part of what is noted came by the feed
        assert feed.round().notes == ()
    happens, reason = FALLBACKS[case]
    happens(uri)
    done, expected = feed.round(), round_by_files(files, monkeypatch)
    assert len(done.notes) == 1
    assert reason in done.notes[0]
    assert done.notes[0].startswith("The catalogue's files are compared: ")
    assert done.rejected == expected.rejected
    assert current(feed) == current(files)
    assert rejected(feed) == rejected(files)
    if case == "off":
        DeltaTable(uri).delete("item_id = 'i8'")
        switch(uri, "true")
        done = feed.round()
        assert (done.deleted, len(done.notes)) == (1, 1)
        assert "changed the table's schema or properties" in done.notes[0]
    DeltaTable(uri).delete("item_id = 'i7'")
    done = feed.round()
    assert (done.deleted, done.notes) == (1, ())
    round_by_files(files, monkeypatch)
    assert current(feed) == current(files)


@pytest.mark.parametrize("seed", range(20))
def test_last_events_are_those_of_a_loop(seed: int) -> None:
    draw = random.Random(seed)
    before = {item: draw.randint(0, 1) for item in range(6)}
    rows, events, last = dict(before), [], {}
    for commit in range(8):
        for item in draw.sample(range(6), 3):
            steps = draw.choice(([False], [False, True]) if rows[item] else ([True], []))
            for came in steps:
                rows[item] += 1 if came else -1
                last[item] = (commit, came)
                events.append((item, commit, came))
    draw.shuffle(events)
    columns = zip(*events, strict=True)
    ids, commits, came = (np.array(column) for column in columns)
    numbers = np.arange(len(ids))
    made = Events(ids.astype(np.uint64), commits, came.astype(bool), numbers, numbers)
    result = last_events(made, np.array([before[item] for item in sorted(last)]))
    assert [events[number] for number in result] == [(item, *last[item]) for item in sorted(last)]


@pytest.mark.parametrize(
    ("came", "before"), [([True], 1), ([False], 0), ([True], 2), ([False], 2), ([True, True], 0), ([True, False], 0)]
)
def test_events_that_leave_the_row_open_are_refused(came: list[bool], before: int) -> None:
    numbers = np.arange(len(came))
    events = Events(np.full(len(came), 7, np.uint64), np.zeros(len(came), int), np.array(came), numbers, numbers)
    with pytest.raises(FeedUnusableError, match="stood in the catalogue twice"):
        last_events(events, np.array([before]))


def test_notes_of_the_feed_stand_above_those_of_the_files_and_stay_few(tmp_path: Path) -> None:
    random_numbers = np.random.default_rng(0)
    store = StateStore(str(tmp_path))
    pack = PackWriter(store)
    ids = np.sort(random_numbers.integers(0, 2**64 - 1, 500, np.uint64))
    piece = pack.add(Records(ids[:300], ids[:300] + np.uint64(1), np.arange(300, dtype=np.uint32)))
    pack.close()
    expected = {int(item): (1, int(item) + 1) for item in ids[:300]}
    state = CatalogueState("c", "i", 0, "s", 0, 0, 300, {"file": SeenFile("", (piece,))})
    for number in range(40):
        pack = PackWriter(store)
        chosen = np.sort(random_numbers.choice(ids, 9, replace=False))
        there = random_numbers.integers(0, 2, 9).astype(np.uint32)
        contents = np.full(9, 1_000 + number, np.uint64)
        feed = store.with_feed(state.feed, Records(chosen, contents, there), pack)
        pack.close()
        state = CatalogueState("c", "i", number, "s", 0, 0, 300, state.files, feed)
        store.write(state)
        expected |= {int(item): (int(flag), 1_000 + number) for item, flag in zip(chosen, there, strict=True)}
    again = StateStore(str(tmp_path)).read()
    assert again == state
    assert len(again.feed) < 8
    counts, contents = store.rows_of(again, ids)
    assert counts.tolist() == [expected.get(int(item), (0, 0))[0] for item in ids]
    told = [int(item) for item in ids if int(item) in expected]
    assert [int(contents[np.searchsorted(ids, item)]) for item in told] == [expected[item][1] for item in told]
