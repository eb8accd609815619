"""CTR and RPM by arm: against loops, on logs with a known difference and without one, and what the report warns of."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chisquare

from mim_ray.errors import DataError
from mim_ray.evaluation.bootstrap import NUM_GROUPS, group_weights
from mim_ray.pipeline.ab import NUM_RESAMPLES, ArmSums, analyse, compare, mismatch_p_value
from mim_ray.pipeline.ab_report import as_html, as_json, as_text, main
from mim_ray.serving.events import SCHEMA, event_log
from mim_ray.serving.exposures import Shown, exposure_log, rows_of, user_hash
from mim_ray.serving.traffic import arm_of

WEIGHTS = {"control": 1.0, "mim": 1.0}
NOW = datetime.now(UTC)


def event(number: int, request: str | None, item: str, name: str, revenue: float | None = None) -> dict:
    return {
        "event_id": f"e{number}", "user_id": "u", "item_id": item, "event": name, "timestamp": NOW,
        "request_id": request, "revenue": revenue, "rating": None,
    }  # fmt: skip


def write(center: str, shown: list[Shown], events: list[dict]) -> None:
    """In several segments, some of them folded."""
    exposures, log = exposure_log(center), event_log(center)
    for place in range(0, len(shown), max(1, len(shown) // 3)):
        exposures.append(rows_of(shown[place : place + max(1, len(shown) // 3)]))
    exposures.fold(keep_s=0)
    for place in range(0, len(events), max(1, len(events) // 2)):
        log.append(pa.Table.from_pylist(events[place : place + max(1, len(events) // 2)], SCHEMA))
        log.fold(keep_s=0)


def simulated(num_users: int, lift: float, seed: int) -> tuple[list[Shown], list[dict]]:
    """A log in which users differ much, and the arm `mim` clicks `lift` times as often as `control`."""
    rng = np.random.default_rng(seed)
    shown, events = [], []
    for number in range(num_users):
        user = f"user-{seed}-{number}"
        arm = arm_of(user, "test", WEIGHTS)
        taste = rng.beta(1, 9) * (lift if arm == "mim" else 1.0)
        for request in range(1 + rng.poisson(2)):
            name = f"{user}-{request}"
            items = [f"i{item}" for item in range(5)]
            shown.append(Shown(name, user_hash(user), arm, "m", items, 0))
            for item in items:
                if rng.random() < taste:
                    events.append(event(len(events), name, item, "click"))
                    if rng.random() < 0.3:
                        events.append(event(len(events), name, item, "purchase", float(rng.exponential(20))))
    return shown, events


def test_the_figures_are_those_of_loops_over_rows_and_users(tmp_path):
    shown, events = simulated(60, 1.5, seed=3)
    events += [
        event(10_000, shown[0].request_id, "i0", "click"),
        event(10_000, shown[0].request_id, "i0", "click"),  # the same event again
        event(10_001, shown[0].request_id, "i0", "click"),  # clicked twice: one click
        event(10_002, shown[1].request_id, "i1", "refund", -5.0),
        event(10_003, shown[1].request_id, "i99", "click"),  # not shown
        event(10_004, None, "i1", "click"),  # of no request
        event(10_005, shown[2].request_id, "i2", "view"),  # neither click nor revenue
    ]
    center = f"{tmp_path}/center"
    write(center, shown, events)
    result = analyse(center, WEIGHTS, seed=7)

    user_of, arm_of_user, exposures = {}, {}, defaultdict(int)
    for one in shown:
        user_of[one.request_id], arm_of_user[one.user_hash] = one.user_hash, one.arm
        exposures[one.user_hash] += len(one.item_ids)
    clicked, revenue, seen, unmatched = set(), defaultdict(float), set(), set()
    for row in events:
        if row["event_id"] in seen or row["request_id"] is None:
            continue
        seen.add(row["event_id"])
        if row["event"] == "click" or row["revenue"] is not None:
            if row["item_id"] not in ("i0", "i1", "i2", "i3", "i4"):
                unmatched.add((row["request_id"], row["item_id"]))
                continue
            if row["event"] == "click":
                clicked.add((row["request_id"], row["item_id"]))
            revenue[user_of[row["request_id"]]] += row["revenue"] or 0.0
    clicks = defaultdict(int)
    for request, _ in clicked:
        clicks[user_of[request]] += 1
    group = {user: int(user[:16], 16) % NUM_GROUPS for user in exposures}
    occupied = np.array([number in set(group.values()) for number in range(NUM_GROUPS)])
    weights = group_weights(occupied, NUM_RESAMPLES, 7)

    def figure(arm: str, what: dict, scale: float, weight: np.ndarray) -> float:
        users = [user for user in exposures if arm_of_user[user] == arm]
        top = math.fsum(what[user] * weight[group[user]] for user in users)
        return scale * top / math.fsum(exposures[user] * weight[group[user]] for user in users)

    def quantile(values: list[float], at: float) -> float:
        place = at * (len(values) - 1)
        low = math.floor(place)
        ordered = sorted(values)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    assert result.num_unmatched == len(unmatched) == 1
    ones = np.ones(NUM_GROUPS)
    for metric, what, scale in (("ctr", clicks, 1.0), ("rpm", revenue, 1_000.0)):
        for arm in WEIGHTS:
            assert result.values[arm][metric].value == pytest.approx(figure(arm, what, scale, ones))
        differences = [figure("mim", what, scale, one) - figure("control", what, scale, one) for one in weights]
        told = result.comparisons[0].difference[metric]
        expected = figure("mim", what, scale, ones) - figure("control", what, scale, ones)
        assert told.value == pytest.approx(expected)
        assert told.low == pytest.approx(quantile(differences, 0.025))
        assert told.high == pytest.approx(quantile(differences, 0.975))
        base = figure("control", what, scale, ones)
        assert result.comparisons[0].percent[metric].value == pytest.approx(100 * expected / base)
    for arm in WEIGHTS:
        assert len(result.arms[arm].users) == sum(arm_of_user[user] == arm for user in exposures)
        assert result.arms[arm].num_requests == sum(one.arm == arm for one in shown)


def test_a_difference_that_is_there_is_found_and_its_interval_holds_it(tmp_path):
    write(str(tmp_path), *simulated(1_500, 1.5, seed=1))
    result = analyse(str(tmp_path), WEIGHTS)
    ctr = result.comparisons[0].percent["ctr"]
    assert 0 < ctr.low < 50 < ctr.high
    assert not result.mismatched
    assert (result.num_unmatched, result.num_users_in_several_arms) == (0, 0)


def test_two_equal_arms_show_no_difference(tmp_path):
    write(str(tmp_path), *simulated(1_500, 1.0, seed=2))
    result = analyse(str(tmp_path), WEIGHTS)
    for metric in ("ctr", "rpm"):
        estimate = result.comparisons[0].difference[metric]
        assert estimate.low < 0 < estimate.high


def test_intervals_of_equal_arms_hold_zero_about_as_often_as_they_say(monkeypatch):
    """Sums by user as the log gives them; 200 experiments, so 95 % are 190 with a deviation of 3."""
    monkeypatch.setattr("mim_ray.pipeline.ab.NUM_RESAMPLES", 250)
    rng, held = np.random.default_rng(0), 0
    for experiment in range(200):
        arms = {}
        for name in ("a", "b"):
            hashes = rng.integers(0, 2**63, 400).astype(np.uint64)
            shown = 1 + rng.poisson(10, 400)
            clicks = rng.binomial(shown, rng.beta(1, 9, 400))
            arms[name] = ArmSums(users=np.unique(hashes))
            columns = (shown, clicks, np.zeros(400))
            arms[name].sums += [
                np.bincount((hashes % np.uint64(NUM_GROUPS)).astype(int), c, NUM_GROUPS) for c in columns
            ]
        ctr = compare(arms, {"a": 1, "b": 1}, base="a", seed=experiment).comparisons[0].difference["ctr"]
        held += ctr.low < 0 < ctr.high
    assert 179 <= held <= 199


@pytest.mark.parametrize("counts", [(500, 520), (10, 990), (300, 310, 390), (1, 0)])
def test_the_split_is_tested_as_scipy_tests_it(counts):
    expected = [1 / len(counts)] * len(counts)
    told = mismatch_p_value(counts, expected)
    assert told == pytest.approx(chisquare(counts, [sum(counts) / len(counts)] * len(counts)).pvalue, rel=1e-9)


def test_a_split_that_is_not_the_intended_one_is_told(tmp_path):
    shown, events = simulated(1_000, 1.0, seed=4)
    lossy = [one for place, one in enumerate(shown) if one.arm == "control" or place % 3]
    kept = {user for user in {one.user_hash for one in shown} if int(user, 16) % 5}
    write(str(tmp_path), [one for one in lossy if one.arm == "control" or one.user_hash in kept], events)
    result = analyse(str(tmp_path), WEIGHTS)
    assert result.mismatched
    assert "SAMPLE RATIO MISMATCH" in as_text(result)
    assert "users are split over the arms as intended" in as_text(analyse(str(tmp_path), {"control": 5.6, "mim": 4.4}))


def test_users_whose_arm_changed_are_told(tmp_path):
    shown = [
        Shown("r1", user_hash("u1"), "a", "m", ["i"], 0),
        Shown("r2", user_hash("u1"), "b", "m", ["i"], 0),
        Shown("r3", user_hash("u2"), "b", "m", ["i"], 0),
    ]
    write(str(tmp_path), shown, [event(1, "r1", "i", "click")])
    result = analyse(str(tmp_path), {})
    assert (result.base, result.num_users_in_several_arms) == ("a", 1)
    assert "1 users were in several arms" in as_text(result)
    assert as_json(result)["arms"]["a"]["ctr"]["value"] == 1.0
    assert as_json(analyse(str(tmp_path), {}, base="b"))["comparisons"]["a"]["ctr"]["difference"]["value"] == 1.0


def test_an_arm_that_several_model_versions_ranked_is_told_and_releases_of_one_model_are_not(tmp_path):
    releases = {"a": ["sim-1@1", "sim-1@2", "sim-1"], "b": ["sim-1", "din-2@3", "din-2@4"]}
    shown = [
        Shown(f"{arm}{place}", user_hash(f"{arm}{place}"), arm, release, ["i", "j"], 0)
        for arm, those in releases.items()
        for place, release in enumerate(those)
    ]
    write(str(tmp_path), shown, [])
    result = analyse(str(tmp_path), {})
    assert as_json(result)["arms"]["a"]["models"] == {"sim-1": 6}
    told = [line for line in as_text(result).splitlines() if "model versions" in line]
    assert len(told) == 1
    assert told[0].startswith("b was ranked by 2 model versions (exposed items: din-2 4, sim-1 2)")


def test_events_of_several_users_under_one_id_all_count(tmp_path):
    shown = [Shown(f"r{user}", user_hash(f"u{user}"), "ab"[user % 2], "m", ["i"], 0) for user in range(4)]
    events = [{**event(1, f"r{user}", "i", "purchase", 5.0), "user_id": f"u{user}"} for user in range(4)]
    write(str(tmp_path), shown, [*events, events[0]])
    result = analyse(str(tmp_path), {})
    assert [arm.total("revenue") for arm in result.arms.values()] == [10.0, 10.0]


def test_what_cannot_be_compared_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"Set serving\.arms"):
        analyse(str(tmp_path), WEIGHTS)
    write(str(tmp_path), [Shown("r1", user_hash("u1"), None, "m", ["i"], 0)], [])
    with pytest.raises(DataError, match=r"Set serving\.arms"):
        analyse(str(tmp_path), WEIGHTS)
    write(str(tmp_path), [Shown("r1", user_hash("u1"), "a", "m", ["i"], 0)], [])
    with pytest.raises(DataError, match="No exposures of the arm 'control'"):
        analyse(str(tmp_path), WEIGHTS, base="control")


def test_the_job_prints_a_table_and_writes_json_and_one_page_with_a_picture(tmp_path, capsys):
    write(f"{tmp_path}/center", *simulated(200, 2.0, seed=5))
    told = [f"run.root={tmp_path}", "serving.arms={control: {}, mim: {variant: din-mim}}"]
    main("doc", ["--config", "tiny", "--json", f"{tmp_path}/ab.json", "--html", f"{tmp_path}/ab.html", *told])
    out = capsys.readouterr().out
    assert re.search(r"^mim, %\s+\+\d+\.\d+ \[", out, re.M)
    figures = json.loads((tmp_path / "ab.json").read_text())
    assert figures["base"] == "control"
    assert figures["arms"]["mim"]["expected_user_ratio"] == 0.5
    page = (tmp_path / "ab.html").read_text()
    assert "<svg" in page
    assert "mim: CTR" in page
    assert not re.search(r'(src|href)="(?!#|data:)', page), "nothing from outside"
    with pytest.raises(SystemExit) as stopped:
        main("doc", ["--config", "tiny", "--since", "yesterday", *told])
    assert stopped.value.code == 2


def test_a_name_is_no_html(tmp_path):
    shown = [Shown("r1", user_hash("u1"), "<b>", "m", ["i"], 0), Shown("r2", user_hash("u2"), "c", "m", ["i"], 0)]
    write(str(tmp_path), shown, [])
    page = as_html(analyse(str(tmp_path), {}), "<script>")
    assert "<script>" not in page
    assert "<b>" not in page.replace("<b>1", "")
