"""Samples of users against plain Python written from SPEC section 2, and the properties of drawn negatives."""

import itertools
import json
import random
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_ray.config.scenario import Samples
from mim_ray.data.event_log import EVENTS, PAIR, POSITIVE, SEARCHED, SHOWN
from mim_ray.data.splits import Split
from mim_ray.data.user_parts import PartJob, write_part_of_users
from mim_ray.data.user_samples import Pool, UserEvents, draw_negatives

DAY = 86_400_000_000
NUM_ITEMS, NUM_USERS = 30, 12
WINDOW_S = 3.0
NEVER = Split(10**18, 10**18)


def random_log(seed, with_ids, num=1_500):
    """Events as dicts in the order of the log, with many ties of time."""
    rng = random.Random(seed)
    log, open_ = [], []
    for seq in range(num):
        time = (seq // 3) * 1_000_000 + 5 * DAY if with_ids else (seq // 3) * 6 * 3_600_000_000 + DAY
        event = {"user": f"u{rng.randrange(NUM_USERS)}", "item": rng.randrange(NUM_ITEMS), "time": time, "seq": seq}
        event |= {"kind": SHOWN, "impression_id": None, "revenue": None}
        if rng.random() < 0.4:
            event |= {"kind": POSITIVE | (PAIR if rng.random() < 0.5 else 0)}
            if open_ and rng.random() < 0.7:  # answers an impression, by its id or by user and item
                shown = rng.choice(open_[-40:])
                event |= {key: shown[key] for key in ("user", "item")}
                event["impression_id"] = shown["impression_id"] if rng.random() < 0.5 else None
            event["revenue"] = 2.5 if rng.random() < 0.5 else None
            if rng.random() < 0.1:
                event["kind"] |= SEARCHED
        elif with_ids:
            event["impression_id"] = f"i{seq}" if rng.random() < 0.8 else None
            open_.append(event)
            if rng.random() < 0.05 and event["impression_id"]:
                log.append(dict(event, seq=-1))
        log.append(event)
    if not with_ids:
        log = [event for event in log if event["kind"] & POSITIVE or rng.random() < 0.2]
        log = [event if event["kind"] & POSITIVE else dict(event, kind=0) for event in log]
    for seq, event in enumerate(log):
        event["seq"] = seq
    rng.shuffle(log)
    return log


def as_table(log):
    rows = [
        dict(event, part=0, user_id=event["user"], query_text=None, query_image=None) for event in log
    ]  # fmt: skip
    return pa.Table.from_pylist([{name: row[name] for name in EVENTS.names} for row in rows], schema=EVENTS)


def job(tmp_path, settings, impressions="logged", build=False, pool=None, split=NEVER):
    return PartJob(
        settings=settings,
        seed=7,
        output=str(tmp_path),
        impressions=impressions,
        build_pairs=build,
        split=split,
        ids=pa.array([f"item{i}" for i in range(NUM_ITEMS)]),
        categories=pa.array([f"c{i % 4}" for i in range(NUM_ITEMS)]),
        has_image=np.arange(NUM_ITEMS) % 5 != 0,
        pool=pool,
    )


def plain_positives(log, user, kind=POSITIVE):
    """A user's positives, oldest first, without direct repeats of an item."""
    chosen = []
    for event in sorted(log, key=lambda e: (e["time"], e["seq"])):
        if event["user"] == user and event["kind"] & kind and not (chosen and chosen[-1]["item"] == event["item"]):
            chosen.append(event)
    return chosen


def plain_behaviors(positives, time, newest, resolution):
    """(item, microseconds) of what the user chose before `time`."""
    known = [
        (f"item{p['item']}", p["time"])
        for p in positives
        if (p["time"] < time if resolution == "exact" else p["time"] // DAY < time // DAY)
    ]
    return known[-newest:]


def behaviors_of(row):
    times = [round(time.timestamp() * 1e6) for time in row["behavior_times"]]
    return list(zip(row["behaviors"], times, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_logged_samples_equal_plain_python(tmp_path, seed):
    log = random_log(seed, with_ids=True)
    settings = Samples(max_behaviors=6, click_window_s=WINDOW_S)
    split = Split(5 * DAY + 300_000_000, 5 * DAY + 400_000_000)
    result = write_part_of_users(as_table(log), job(tmp_path, settings, split=split)).to_pylist()[0]

    ordered = sorted(log, key=lambda e: (e["time"], e["seq"]))
    expected, seen = {}, set()
    for event in ordered:
        key = (event["user"], event["impression_id"], event["item"])
        if event["kind"] == SHOWN and (event["impression_id"] is None or key not in seen):
            seen.add(key)
            expected[event["seq"]] = dict(event, label=0, revenue=0.0)
    for event in ordered:
        if not event["kind"] & POSITIVE:
            continue
        answered = None
        if event["impression_id"] is not None:
            same = [
                e
                for e in expected.values()
                if (e["user"], e["impression_id"], e["item"]) == (event["user"], event["impression_id"], event["item"])
            ]
            answered = same[0] if same else None
        elif not event["kind"] & SEARCHED:
            before = [
                e
                for e in expected.values()
                if (e["user"], e["item"]) == (event["user"], event["item"])
                and 0 <= event["time"] - e["time"] <= WINDOW_S * 1e6
            ]
            answered = max(before, key=lambda e: (e["time"], e["seq"])) if before else None
        if answered is not None:
            answered["label"] = 1
            answered["revenue"] += event["revenue"] or 0.0
    positives = {user: plain_positives(log, user) for user in {event["user"] for event in log}}

    made = {}
    for name in ("train", "validation", "test"):
        table = pq.read_table(tmp_path / "impressions" / name)
        times = table["timestamp"].cast(pa.int64()).to_pylist()
        assert times == sorted(times)
        made |= {row["impression_id"]: row for row in table.to_pylist()}
        assert set(table["split"].to_pylist()) == {name}
    assert len(made) == len(expected)
    for event in expected.values():
        row = made[event["impression_id"] or f"row{event['seq']}"]
        assert row["user_id"] == event["user"]
        assert row["item_id"] == f"item{event['item']}"
        assert row["label"] == event["label"]
        assert (row["revenue"] or 0.0) == event["revenue"]
        assert behaviors_of(row) == plain_behaviors(positives[event["user"]], event["time"], 6, "exact")
        late = (event["time"] >= split.validation_start) + (event["time"] >= split.test_start)
        assert row["split"] == ("train", "validation", "test")[late]
        assert not row["drawn"]
    counts = json.loads(result["counts"])
    assert counts["train rows"] == sum(row["split"] == "train" for row in made.values())
    assert len(json.loads(result["rejects"])) == sum(e["kind"] == SHOWN for e in log) - len(expected) > 0
    first, num, test = {}, Counter(), Counter()
    for row in sorted(made.values(), key=lambda r: r["timestamp"]):
        if row["split"] == "train" and row["label"]:
            first.setdefault(row["item_id"], row["timestamp"])
            num[row["item_id"]] += 1
        test[row["item_id"]] += row["split"] == "test"
    assert dict(zip(result["train_items"], result["train_positives"], strict=True)) == num
    for item, time in zip(result["train_items"], result["train_first"], strict=True):
        assert time == round(first[item].timestamp() * 1e6)
    assert dict(zip(result["test_items"], result["test_rows"], strict=True)) == {k: v for k, v in test.items() if v}
    newest = {row["user_id"]: behaviors_of(row) for row in pq.read_table(tmp_path / "behaviors").to_pylist()}
    assert newest == {user: plain_behaviors(known, 10**18, 6, "exact") for user, known in positives.items() if known}


@pytest.mark.parametrize("with_ids", [True, False])
def test_features_of_an_event_are_those_of_its_samples(tmp_path, with_ids):
    log = random_log(5, with_ids)
    table = as_table(log)
    devices = pa.array([None if seq % 7 == 0 else f"d{seq}" for seq in table["seq"].to_pylist()])
    tags = pa.array([[f"t{seq}"] for seq in table["seq"].to_pylist()])
    table = table.append_column("device", devices).append_column("tags", tags)
    positives = [event for event in log if event["kind"] & POSITIVE]
    times = np.sort([event["time"] for event in positives])
    pool = Pool(times, np.arange(len(times)) % NUM_ITEMS, np.zeros(NUM_ITEMS, np.int64), np.arange(NUM_ITEMS))
    made = job(tmp_path, Samples(), "logged" if with_ids else "drawn", pool=pool)
    counts = json.loads(write_part_of_users(table, made).to_pylist()[0]["counts"])
    rows = pq.read_table(tmp_path / "impressions" / "train").to_pylist()
    shown = sorted((event for event in log if event["kind"] == SHOWN), key=lambda e: -e["seq"])  # the first one counts
    by_name = {event["impression_id"] or f"row{event['seq']}": event["seq"] for event in shown}
    for row in rows:
        seq = by_name[row["impression_id"]] if with_ids else int(row["request_id"].removeprefix("p"))
        assert (row["device"], row["tags"]) == (None if seq % 7 == 0 else f"d{seq}", [f"t{seq}"])
    assert with_ids or any(row["drawn"] for row in rows)
    assert counts["impressions without device"] == sum(row["device"] is None for row in rows) > 0


def test_the_order_in_which_the_shuffle_brings_rows_changes_nothing(tmp_path):
    log = random_log(1, with_ids=True)
    for name in ("a", "b"):
        write_part_of_users(as_table(log), job(tmp_path / name, Samples()))
        random.Random(3).shuffle(log)
    for table in ("impressions/train", "behaviors"):
        assert pq.read_table(tmp_path / "a" / table).equals(pq.read_table(tmp_path / "b" / table))


def pool_of(log, created):
    events = sorted((e for e in log if e["kind"] & POSITIVE), key=lambda e: e["time"])
    order = np.argsort(created, kind="stable")
    return Pool(np.array([e["time"] for e in events]), np.array([e["item"] for e in events]), created[order], order)


@pytest.mark.parametrize("resolution", ["exact", "day"])
def test_drawn_negatives_existed_then_are_not_the_users_own_and_come_from_the_window(tmp_path, resolution):
    log = random_log(5, with_ids=False, num=400)
    first = {item: min(e["time"] for e in log if e["item"] == item) for item in range(NUM_ITEMS)}
    created = np.array([first[item] - 3_600_000_000 for item in range(NUM_ITEMS)])
    settings = Samples(
        max_behaviors=5,
        num_drawn_negatives=3,
        drawn_window_days=2.0,
        drawn_uniform_ratio=0.0,
        time_resolution=resolution,
    )
    write_part_of_users(as_table(log), job(tmp_path, settings, "drawn", pool=pool_of(log, created)))
    rows = pq.read_table(tmp_path / "impressions" / "train").to_pylist()
    own = defaultdict(set)
    for event in log:
        own[event["user"]].add(f"item{event['item']}")
    positives = {user: plain_positives(log, user) for user in own}
    requests = defaultdict(list)
    for row in rows:
        requests[row["request_id"]].append(row)
        time = round(row["timestamp"].timestamp() * 1e6)
        assert behaviors_of(row) == plain_behaviors(positives[row["user_id"]], time, 5, resolution)
        assert row["drawn"] == (not row["label"])
        if row["drawn"]:
            item = int(row["item_id"][4:])
            cutoff = time if resolution == "exact" else time // DAY * DAY
            assert row["item_id"] not in own[row["user_id"]]
            assert created[item] <= cutoff if resolution == "exact" else created[item] < cutoff
    assert len(requests) == sum(len(known) for known in positives.values())
    for request in requests.values():
        assert sum(row["label"] for row in request) == 1
        assert len({row["item_id"] for row in request}) == len(request) <= 4
    assert sum(len(request) == 4 for request in requests.values()) > len(requests) / 3  # some users own nearly all


def draw(num_samples=4_000, **changes):
    """Samples at time 1000 of users without own items; items 0-9 have events in the window, 10-19 before, 20-29 later."""
    time = np.full(num_samples, 1_000)
    user, zero = np.arange(num_samples), np.zeros(num_samples, np.int64)
    samples = UserEvents(user, zero + 29, time, np.arange(num_samples), zero + POSITIVE, zero - 1, zero + 0.0)
    event_item = np.concatenate([np.arange(10, 20), np.repeat(np.arange(10), np.arange(1, 11)), np.arange(20, 30)])
    event_time = np.concatenate([np.full(10, 100), np.full(55, 900), np.full(10, 1_000)])
    pool = Pool(event_time, event_item, np.concatenate([np.full(20, 50), np.full(10, 1_001)]), np.arange(30))
    arguments = dict(seed=1, num=2, window_us=500, uniform_ratio=0.0, num_items=30)
    return draw_negatives(samples, samples, pool, **(arguments | changes))


def test_popular_items_of_the_window_are_drawn_in_proportion_to_their_events():
    drawn = draw(num=1)
    shares = np.bincount(drawn.reshape(-1), minlength=30) / drawn.size
    assert np.allclose(shares[:10], np.arange(1, 11) / 55, atol=0.02)
    assert not shares[10:].any()


def test_the_floor_reaches_items_without_events_but_none_that_did_not_exist():
    shares = np.bincount(draw(num=1, uniform_ratio=1.0).reshape(-1), minlength=30) / 4_000
    assert np.allclose(shares[:20], 1 / 20, atol=0.015)
    assert not shares[20:].any()
    mixed = np.bincount(draw(num=1, uniform_ratio=0.2).reshape(-1), minlength=30) / 4_000
    assert mixed[10:20].sum() == pytest.approx(0.1, abs=0.02)


def test_an_empty_window_falls_back_to_what_existed():
    shares = np.bincount(draw(num=1, window_us=50).reshape(-1), minlength=30)
    assert (shares[:20] > 0).all()


def test_negatives_do_not_depend_on_how_users_are_parted():
    whole = draw(num_samples=50)
    assert (whole == draw(num_samples=80)[:50]).all()
    assert (whole != draw(num_samples=50, seed=2)).any()


def test_a_user_who_owns_everything_gets_no_negatives():
    zero = np.zeros(1, np.int64)
    sample = UserEvents(zero, zero, zero + 1_000, zero, zero + POSITIVE, zero - 1, zero + 0.0)
    own = UserEvents(*(np.zeros(30, np.int64) for _ in range(7)))
    own.item = np.arange(30)
    pool = Pool(np.array([900]), np.array([3]), np.zeros(30, np.int64), np.arange(30))
    drawn = draw_negatives(sample, own, pool, seed=0, num=2, window_us=500, uniform_ratio=0.5, num_items=30)
    assert drawn.tolist() == [[-1, -1]]


def test_built_pairs_equal_plain_python(tmp_path):
    log = random_log(9, with_ids=False)
    settings = Samples(pair_window_days=1.5)
    split = Split(60 * DAY, 80 * DAY)
    write_part_of_users(as_table(log), job(tmp_path, settings, "none", build=True, split=split))
    made = pq.read_table(tmp_path / "interest_pairs").to_pylist()
    expected = []
    for user in {event["user"] for event in log}:
        chosen = plain_positives(log, user, PAIR)
        for query, bought in itertools.pairwise(chosen):
            if bought["time"] - query["time"] <= 1.5 * DAY and bought["time"] < 60 * DAY and query["item"] % 5:
                expected.append((f"item{query['item']}", f"item{bought['item']}", user, bought["time"]))
    key = [(r["query_item_id"], r["item_id"], r["user_id"], round(r["timestamp"].timestamp() * 1e6)) for r in made]
    assert sorted(key) == sorted(expected)
    assert len(made) > 20
    assert all(row["built"] and row["signal"] == "purchase" and row["query_image"] is None for row in made)
    assert all(row["category"] == f"c{int(row['item_id'][4:]) % 4}" for row in made)


def test_an_impression_id_that_shows_several_items_is_a_request(tmp_path):
    base = {"user": "u", "time": 1_000, "kind": SHOWN, "revenue": None}
    log = [dict(base, item=1, seq=0, impression_id="r"), dict(base, item=2, seq=1, impression_id="r")]
    log.append(dict(base, item=2, seq=2, impression_id="r", kind=POSITIVE, time=2_000))
    write_part_of_users(as_table(log), job(tmp_path, Samples()))
    rows = pq.read_table(tmp_path / "impressions" / "train").sort_by("impression_id").to_pylist()
    assert [(r["impression_id"], r["request_id"], r["label"]) for r in rows] == [
        ("r/item1", "r", 0),
        ("r/item2", "r", 1),
    ]
