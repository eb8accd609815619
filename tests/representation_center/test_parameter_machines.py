"""Parameter machines on a real Ray: killed, stopped, switched, and never a wrong row."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayError

from mim_ray import artifacts
from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.errors import ArtifactError, ConfigError, MimRayError, UnavailableError
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.machine_release import MachineRelease, TableSource
from mim_ray.representation_center.parameter_client import ParameterClient, _Question
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.representation_center.snapshot import Snapshot, write_snapshot
from mim_ray.representation_center.snapshot_line import kept_snapshots
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import append_segment, segment_rows

pytestmark = pytest.mark.ray

START = datetime(2025, 1, 1, tzinfo=UTC)
NUM, WIDTH = 400, 4
IDS = [f"i{number}" for number in range(NUM)]


@dataclass
class Center:
    """A table of `NUM` items whose vectors say their number, an ID table whose vectors say the release, dense parameters."""

    root: str

    def release(self, name: str, value: float) -> MachineRelease:
        """Item i's MM vector is value + i, its ID vector is value."""
        table = EmbeddingTable(f"{self.root}/table-{name}").create()
        ids = [*IDS, "spare"]
        vectors = value + np.repeat(np.arange(len(ids), dtype=np.float32)[:, None], WIDTH, axis=1)
        rows = segment_rows(ids, vectors, content_hashes=["h"] * len(ids), content_at=[START] * len(ids))
        table.append(rows, encoder_version="v1", shard_id="s0")
        mm = build_snapshot(table, "v1", f"{self.root}/snapshots-{name}/v1", dtype="float16")
        line = f"{self.root}/id-tables-{name}"
        write_snapshot(line, IDS, np.full((NUM, 2), value, np.float32), encoder_version="none")
        artifacts.write_tensors(f"{self.root}/dense-{name}.safetensors", {"weight": torch.full((3,), value)})
        tables = {
            "mm": TableSource(mm.uri, table.uri, f"{self.root}/window"),
            "item_id": TableSource(Snapshot.open(line).uri),
        }
        return MachineRelease(name, tables, {"ctr": f"{self.root}/dense-{name}.safetensors"})

    def post(self, ids: list[str], value: float, day: float) -> tuple[str, object]:
        """Store a message: an acknowledged new item."""
        rows = segment_rows(
            ids,
            np.full((len(ids), WIDTH), value, np.float32),
            content_hashes=["x"] * len(ids),
            content_at=[START + timedelta(days=day)] * len(ids),
            categories=["shoes"] * len(ids),
        )
        return append_segment(f"{self.root}/window", rows, encoder_version="v1"), rows


def settings(folder: Path, **options: object) -> Settings:
    values: dict[str, object] = {"shards": 2, "replicas": 2, "cpus_per_machine": 0, "folder": str(folder)}
    return Settings(**(values | {"deadline_ms": 30_000, "follow_every_s": 0.05} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def center(tmp_path_factory: pytest.TempPathFactory) -> Center:
    return Center(str(tmp_path_factory.mktemp("center")))


@pytest.fixture(scope="module")
def fleet(ray_cluster: None, center: Center, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParameterMachines]:
    """2 shards × 2 replicas."""
    folder = tmp_path_factory.mktemp("machines")
    machines = ParameterMachines.start(f"{center.root}/machines.json", center.release("one", 0), settings(folder))
    yield machines
    machines.stop()
    assert not list(folder.iterdir()), "machines that are stopped leave no files"


@pytest.fixture(scope="module")
def single(ray_cluster: None, center: Center, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParameterMachines]:
    """One machine alone."""
    options = settings(tmp_path_factory.mktemp("single"), shards=1, replicas=1, freshness_s=1.0)
    machines = ParameterMachines.start(f"{center.root}/single.json", center.release("alone", 0), options)
    yield machines
    machines.stop()


def clients(machines: ParameterMachines, **options: object) -> list[ParameterClient]:
    """One that reads mappings, one that calls."""
    changed = machines.settings.model_copy(update=options)
    return [ParameterClient(machines.state, changed, direct=direct) for direct in (True, False)]


def test_a_table_of_which_only_called_shards_are_asked_is_answered_beside_one_that_is_read_here() -> None:
    question = _Question(["one"], 2)
    (shard,) = question.shards
    vector = np.ones((1, 3), np.float32)
    found = question.join((None, "ids", {1 - shard}), {shard: (vector, np.ones(1, bool), np.empty(0, int), [])}, 3)  # type: ignore[arg-type]
    assert (found.matrix == vector).all()
    assert found.found.all()


def pids(machines: ParameterMachines) -> dict[tuple[int, int], int]:
    found = {}
    for place, status in zip(machines.actors, machines.status(), strict=True):
        if "pid" in status and status["serial"] is not None:
            found[place] = status["pid"]
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_reading_mappings_and_calling_give_the_tables_rows(fleet: ParameterMachines) -> None:
    asked = [*IDS[::-1], "nobody", None]
    for client in clients(fleet):
        answer = client.multi_get(asked)
        assert answer.found.tolist() == [True] * NUM + [False] * 2
        assert answer.matrix[:, 1].tolist() == [*range(NUM - 1, -1, -1), 0, 0]
        assert (answer.release, answer.degraded, answer.matrix.dtype) == ("one", False, np.float32)
        many = client.multi_get([*IDS * 60, "nobody"])  # large answers travel in pieces
        assert many.matrix[:, 2].tolist() == [*list(range(NUM)) * 60, 0]
        assert many.found.sum() == 60 * NUM
        both = client.get_many({"mm": ["i3", "x"], "item_id": ["i3", "i4", "x"]})
        assert both["item_id"].matrix.tolist() == [[0, 0], [0, 0], [0, 0]]
        assert both["item_id"].found.tolist() == [True, True, False]
        assert client.multi_get([]).matrix.shape[0] == 0
        with pytest.raises(ArtifactError, match=r"one.*does not hold 'prices'"):
            client.multi_get(["i1"], "prices")


def test_a_client_travels_to_tasks_and_dense_parameters_come_by_name(fleet: ParameterMachines) -> None:
    @ray.remote(num_cpus=0)
    def task(client: ParameterClient) -> tuple[list[float], bytes]:
        return client.multi_get(["i7", "i11"]).matrix[:, 0].tolist(), client.dense("ctr")

    values, content = ray.get(task.remote(fleet.client()))
    assert values == [7, 11]
    from safetensors.torch import load

    assert load(content)["weight"].tolist() == [0, 0, 0]
    with pytest.raises(ArtifactError, match="does not hold 'other'"):
        fleet.client().dense("other")


def test_a_stored_item_is_seen_in_every_way_pushed_or_not(fleet: ParameterMachines, center: Center) -> None:
    for name, pushed in (("pushed-1", True), ("found-1", False)):
        segment, rows = center.post([name, "spare"], 0.5 if pushed else 0.75, 1 if pushed else 2)
        if pushed:
            client = fleet.client()
            wait_until(lambda: client.push("v1", segment, rows), "not all machines confirm it")  # noqa: B023
            assert not client.push("other", segment, rows), "their release is of another encoder version"
        content = 0.5 if pushed else 0.75
        for client in clients(fleet):  # another replica may be asked each time, so all of an answer is waited for

            def seen(client: ParameterClient = client, name: str = name, content: float = content) -> bool:
                answer = client.multi_get(["i6", name, "spare"])
                new = answer.matrix[:, 0].tolist() == [6, content, content]
                return new and answer.category.to_pylist() == [None, "shoes", "shoes"]

            wait_until(seen, f"{name} is not seen")
    wait_until(lambda: held(fleet) == held(fleet, replica=1), "a replica lacks an item")


def held(machines: ParameterMachines, replica: int = 0) -> list[int]:
    """Items after the snapshot, by shard."""
    counts = [status["overlay_items"]["mm"] for status in machines.status()]
    return counts[replica :: machines.settings.replicas]


class Asking:
    """Threads that ask without pause and compare every row."""

    def __init__(self, ask: Callable[[], None], num: int = 3) -> None:
        self.num_answers, self.errors = 0, list[Exception]()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(ask,), daemon=True) for _ in range(num)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        assert not self.errors, self.errors[0]

    def _run(self, ask: Callable[[], None]) -> None:
        while not self._stop.is_set() and not self.errors:
            try:
                ask()
                self.num_answers += 1
            except (AssertionError, MimRayError, RayError) as error:
                self.errors.append(error)


def checked(client: ParameterClient) -> Callable[[], None]:
    expected = np.repeat(np.arange(NUM, dtype=np.float32)[:, None], WIDTH, axis=1)

    def ask() -> None:
        answer = client.multi_get(IDS)
        assert answer.found.all()
        assert not answer.degraded
        np.testing.assert_array_equal(answer.matrix, expected)

    return ask


def test_with_two_replicas_lookups_go_on_while_machines_are_killed(fleet: ParameterMachines) -> None:
    reading, calling = clients(fleet)
    before = pids(fleet)
    with Asking(checked(reading), 1) as reads, Asking(checked(calling), 2) as calls:
        for place in ((0, 0), (1, 1)):
            kill(before[place])
            counts = reads.num_answers, calls.num_answers
            wait_until(lambda counts=counts: reads.num_answers > counts[0] + 5, "reading stands still")
            wait_until(lambda counts=counts: calls.num_answers > counts[1] + 5, "calls stand still")
            wait_until(
                lambda place=place: pids(fleet).get(place, before[place]) != before[place], "the machine is not back"
            )
    after = pids(fleet)
    assert {place for place in before if after[place] != before[place]} == {(0, 0), (1, 1)}


def test_switching_releases_stops_no_lookup_and_mixes_nothing(fleet: ParameterMachines, center: Center) -> None:
    second = center.release("two", 1_000)

    def ask_with(client: ParameterClient) -> Callable[[], None]:
        def ask() -> None:
            answers = client.get_many({"mm": IDS[:50], "item_id": IDS[50:80]})
            assert len({answer.serial for answer in answers.values()}) == 1
            base = {"one": 0, "two": 1_000}[answers["mm"].release]
            assert (answers["item_id"].matrix == base).all()
            assert (answers["mm"].matrix[:, 0] - base).tolist() == list(range(50))

        return ask

    reading, calling = clients(fleet)
    with Asking(ask_with(reading), 1) as reads, Asking(ask_with(calling), 2) as calls:
        fleet.load(second)
        assert {client.multi_get(["i1"]).release for client in clients(fleet)} == {"two"}
        counts = reads.num_answers, calls.num_answers
        wait_until(lambda: reads.num_answers > counts[0] + 3 and calls.num_answers > counts[1] + 3, "lookups stopped")
    line, _, state = second.tables["mm"].snapshot.rpartition("/")
    assert kept_snapshots(line) == {fleet.owner: state}, "no refresh prunes what the machines need to come back"
    missing = MachineRelease("three", {"mm": TableSource(f"{center.root}/nowhere")})
    with pytest.raises(ArtifactError, match="nowhere"):
        fleet.load(missing)
    assert fleet.client().multi_get(["i1"]).release == "two"
    kill(pids(fleet)[0, 0])
    wait_until(lambda: len(pids(fleet)) == 4, "the machine is not back")
    assert {status["serial"] for status in fleet.status()} == {2}, "one that comes back opens the switched release"


def test_machines_that_run_are_found_again_and_not_in_another_shape(fleet: ParameterMachines, center: Center) -> None:
    again = ParameterMachines.start(fleet.state, center.release("four", 0), fleet.settings)
    assert pids(again) == pids(fleet)
    assert fleet.client().multi_get(["i9"]).release == "four"
    with pytest.raises(ConfigError, match=r"2 shards and 2 replicas, not with 3 and 2"):
        ParameterMachines.start(fleet.state, center.release("five", 0), fleet.settings.model_copy(update={"shards": 3}))


def test_a_release_that_cannot_be_opened_is_a_sentence(ray_cluster: None, tmp_path: Path) -> None:
    missing = MachineRelease("none", {"mm": TableSource(f"{tmp_path}/nowhere")})
    with pytest.raises(ArtifactError, match="nowhere"):
        ParameterMachines.start(f"{tmp_path}/state.json", missing, settings(tmp_path, shards=1, replicas=1))


def test_one_machine_alone_is_waited_for_or_answered_as_unknown(single: ParameterMachines, center: Center) -> None:
    center.post(["late-1"], 0.5, 1)
    _, waiting = clients(single)
    wait_until(lambda: bool(waiting.multi_get(["late-1"]).found[0]), "the item is not seen")
    _, degrading = clients(single, deadline_ms=50, degrade=True)
    _, failing = clients(single, deadline_ms=50)
    degrading.multi_get(["i1"])
    pid = pids(single)[0, 0]
    kill(pid)
    answer = degrading.multi_get(["i1", "late-1"])
    assert answer.degraded
    assert not answer.found.any()
    assert (answer.matrix == 0).all()
    with pytest.raises(UnavailableError, match="did not answer within 50 ms"):
        failing.multi_get(["i1"])
    answer = waiting.multi_get(["i3", "late-1"])
    assert answer.matrix[:, 0].tolist() == [3, 0.5], "rebuilt from the snapshot and the window"
    assert not answer.degraded
    assert pids(single)[0, 0] != pid


def test_a_machine_that_hangs_does_not_show_an_old_row_beyond_the_bound(
    single: ParameterMachines, center: Center
) -> None:
    bound = single.settings.freshness_s
    readers = clients(single, deadline_ms=200)
    pid = pids(single)[0, 0]
    for reader in readers:
        assert reader.multi_get(["i8"]).matrix[0, 0] == 8
    os.kill(pid, signal.SIGSTOP)
    try:
        center.post(["i8"], 0.25, 1)  # acknowledged
        time.sleep(bound)
        for reader in readers:
            with pytest.raises(UnavailableError):
                reader.multi_get(["i8"])
    finally:
        os.kill(pid, signal.SIGCONT)
    for reader in clients(single):
        assert reader.multi_get(["i8"]).matrix[0, 0] == 0.25


@pytest.mark.chaos
def test_soak_kills_stops_and_switches_while_items_keep_coming(
    ray_cluster: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random kills and hangs (KILLS, 20), switches of releases, and a stream of messages: never a row that was never true,
    never an old one after the bound, and at the end everything everywhere."""
    rng = random.Random(0)
    center = Center(str(tmp_path))
    options = settings(tmp_path_factory.mktemp("soak"), freshness_s=2.0)
    release = {"one": 0.0, "two": 1_000.0}
    releases = {name: center.release(name, value) for name, value in release.items()}
    machines = ParameterMachines.start(f"{tmp_path}/state.json", releases["one"], options)
    posted: list[tuple[float, float]] = []  # (time of the acknowledgement, value) of the item "hot"

    def ask_with(client: ParameterClient) -> Callable[[], None]:
        def ask() -> None:
            least = max((value for at, value in posted if at < time.monotonic() - options.freshness_s), default=0.0)
            answers = client.get_many({"mm": ["hot", *IDS], "item_id": IDS[:20]})
            base = release[answers["mm"].release]
            assert (answers["item_id"].matrix == base).all()
            assert (answers["mm"].matrix[1:, 0] - base).tolist() == list(range(NUM))
            if least:
                assert answers["mm"].matrix[0, 0] >= least, "an old row after the bound"

        return ask

    try:
        reading, calling = clients(machines)
        with Asking(ask_with(reading), 1) as reads, Asking(ask_with(calling), 2) as calls:
            for number in range(int(os.environ.get("KILLS", "20"))):
                place = rng.choice(list(machines.actors))
                known = pids(machines)
                if place in known:
                    action = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
                    os.kill(known[place], action)
                end = time.monotonic() + rng.uniform(0.0, 4.0)
                while time.monotonic() < end:
                    value = (number * 1_000 + len(posted)) / 8 + 1
                    segment, rows = center.post(["hot"], value, len(posted) + 1)
                    posted.append((time.monotonic(), float(np.float16(value))))
                    machines.client().push("v1", segment, rows)  # type: ignore[arg-type]
                    time.sleep(0.05)
                if place in known and action == signal.SIGSTOP:
                    os.kill(known[place], signal.SIGCONT)
                wait_until(lambda: len(pids(machines)) == len(machines.actors), "a machine is not back")
                if number % 5 == 4:
                    machines.load(releases[rng.choice(list(release))])
        print(f"{reads.num_answers} read, {calls.num_answers} called, {len(posted)} messages")
        for client in clients(machines):
            wait_until(
                lambda client=client: client.multi_get(["hot"]).matrix[0, 0] == posted[-1][1], "the last is not seen"
            )
    finally:
        machines.stop()
