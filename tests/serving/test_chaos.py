"""Both apps and parameter machines on a real Ray, under constant load by real HTTP, while processes die and releases change.

What is in flight inside the killed process may fail; nothing else does, and nothing by the shipped client. No score is wrong,
and nothing that was acknowledged is lost. The tests print what they saw (-s).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ray import serve

from mim_ray import artifacts
from mim_ray.config import Scenario
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.parameter_machines import ParameterMachines
from mim_ray.representation_center.release import promote, read_release
from mim_ray.serving import local, new_item_app, ranker
from mim_ray.serving.client import Client
from mim_ray.serving.machines import load_current
from mim_ray.serving.promotion import promote_version
from mim_ray.serving.served import Served

from .chaos_damage import with_damaged_snapshot, with_nan, without_network
from .chaos_load import Load, check_only_refused_until_back, kill_one, processes, until
from .chaos_reference import Reference, check_answers

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]
CALLERS = 2  # of each kind (rank, items, events) and way (bare HTTP, the client)
DEADLINE_S = 60.0  # of the client
RANKING, ENCODER = "ray::ServeReplica:ranking", "ray::ServeReplica:new_item_encoder"
MACHINE, PROXY = "ray::MachineActor", "ray::ProxyActor"


@dataclass
class Shop:
    """Both apps on machines of 2 shards × 2 replicas, and what they should answer."""

    url: str
    scenario: Scenario
    machines: ParameterMachines
    reference: Reference
    client: Client
    new_load: Callable[..., Load]
    version: str

    def promote(self, ctr: str) -> str:
        """Release ctr/<name> to the apps; the model's version."""
        promote_version(self.scenario, ctr=ctr)
        version = self.reference.add_current(self.scenario)
        load_current(self.scenario)
        return version

    def healthy(self) -> bool:
        """All replicas and machines are there and ready."""
        states = [
            deployment.replica_states
            for app in serve.status().applications.values()
            for deployment in app.deployments.values()
        ]
        return states == [{"RUNNING": 2}] * 2 and all(where.get("serial") for where in self.machines.status())


@pytest.fixture(scope="module")
def shop(ray_cluster: None, new_run: Any, picture: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("chaos")
    root = f"{folder}/run"
    shutil.copytree(new_run.root, root, symlinks=True)
    manifest = Path(f"{root}/extraction/artifact.json")
    manifest.write_text(manifest.read_text().replace(str(new_run.root), root))
    shutil.copytree(f"{root}/ctr/sim-mim", f"{root}/ctr/other-mim")
    path = f"{root}/ctr/other-mim/seed-0/tables.safetensors"
    artifacts.write_tensors(path, {name: -30 * table for name, table in artifacts.read_tensors(path).items()})
    info = artifacts.read_json(f"{root}/ctr/other-mim/ctr.json")
    artifacts.write_json(f"{root}/ctr/other-mim/ctr.json", info | {"metrics": {"auc": 0.5}})  # else of the same version
    scenario = new_run.scenario
    machines = {"state": f"{folder}/machines.json", "folder": f"{folder}/machines", "cpus_per_machine": 0.0}
    serving = {"num_replicas": 2, "cpus_per_replica": 0.25, "follow_release_s": 0.5, "similar_items": False}
    serving["body_timeout_s"] = 60.0  # a starved test machine is no slow stranger
    changed = {
        "machines": scenario.machines.model_copy(update=machines),
        "serving": scenario.serving.model_copy(update=serving),
        "run": scenario.run.model_copy(update={"root": root}),
    }
    scenario = scenario.model_copy(update=changed)
    promote_version(scenario, ctr="sim-mim")
    reference = Reference()
    version = reference.add_current(scenario)
    fleet = load_current(scenario)
    url = local.start(scenario)
    client = Client(url, deadline_s=DEADLINE_S)

    def new_load(name: str, callers: int = CALLERS) -> Load:
        return Load(url, name, callers=callers, client=client, picture=picture)

    yield Shop(url, scenario, fleet, reference, client, new_load, version)
    local.stop()
    fleet.stop()


@pytest.mark.parametrize(
    ("title", "kinds", "most"),
    [
        (RANKING, ("rank", "events"), ranker.MAX_ONGOING_REQUESTS),
        (ENCODER, ("items",), new_item_app.MAX_ONGOING_REQUESTS),
    ],
    ids=["ranking", "encoder"],
)
def test_a_killed_replica_costs_what_it_had_in_work_and_the_client_nothing(
    shop: Shop, title: str, kinds: tuple[str, ...], most: int
) -> None:
    with shop.new_load(f"replica-{kinds[0]}", most) as load:  # more callers than it takes at once
        killed = kill_one(title, load, shop.healthy, kinds=kinds)
    print(load.told())
    under_way = [call for call in load.calls if call.kind in kinds and call.under_way_at(killed)]
    assert under_way, "nothing was under way"
    failed = load.failures(shipped=False)
    assert [call for call in failed if call not in under_way] == []
    assert len(failed) <= most
    assert load.failures(shipped=True) == []
    check_answers(load, shop.reference, shop.scenario, shop.client)


def test_a_killed_parameter_machine_costs_nothing(shop: Shop) -> None:
    with shop.new_load("machine") as load:
        kill_one(MACHINE, load, shop.healthy)
    print(load.told())
    assert [call for call in load.calls if call.failed] == []
    assert {tuple(call.answer["degraded"]) for call in load.acknowledged("rank")} == {()}
    check_answers(load, shop.reference, shop.scenario, shop.client)


def test_while_both_machines_of_a_shard_are_away_answers_are_id_only_and_say_so(shop: Shop) -> None:
    others = {where["pid"] for where in shop.machines.status() if where["shard"] == 0}
    killed = set()
    with shop.new_load("shard") as load:
        load.wait_for_more(10)

        def degraded_while_killed() -> bool:
            for pid in processes(MACHINE).keys() - others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            return any(call.answer["degraded"] for call in load.acknowledged("rank"))

        until(degraded_while_killed, "the shard is not missed")
        until(shop.healthy, "it does not come back")
        until(lambda: not any(call.answer["degraded"] for call in load.acknowledged("rank")[-20:]), "it stays degraded")
        load.wait_for_more(10)
    assert len(killed) >= 2
    assert processes(MACHINE).keys() & killed == set()
    degraded = Counter(tuple(call.answer["degraded"]) for call in load.acknowledged("rank"))
    print(load.told(), dict(degraded))
    assert [call for call in load.calls if call.failed] == []
    assert degraded[("content", "tables")] > 0
    check_answers(load, shop.reference, shop.scenario, shop.client)


def test_a_killed_proxy_refuses_until_another_listens_and_the_client_waits_for_it(shop: Shop) -> None:
    with shop.new_load("proxy") as load:
        killed = kill_one(PROXY, load, shop.healthy)
    print(load.told())
    check_only_refused_until_back(load, killed)
    assert load.failures(shipped=True) == []
    check_answers(load, shop.reference, shop.scenario, shop.client)


def test_releases_are_rolled_out_and_back_and_no_request_fails(shop: Shop) -> None:
    with shop.new_load("release") as load:
        load.wait_for_more(10)
        versions = [shop.version]
        for ctr in ("other-mim", "sim-mim"):
            versions.append(shop.promote(ctr))
            until(
                lambda: {call.answer["model_version"] for call in load.acknowledged("rank")[-20:]} == {versions[-1]},
                "the replicas do not follow",
            )
    print(load.told(), Counter(call.answer["model_version"] for call in load.acknowledged("rank")))
    assert versions[0] == versions[2] != versions[1]
    a_rank = load.acknowledged("rank")[0]
    of_each = [list(shop.reference.scores(a_rank.body, version).values()) for version in versions[:2]]
    assert of_each[0] != pytest.approx(of_each[1], abs=1e-2), "they could not be told apart"
    assert [call for call in load.calls if call.failed] == []
    assert {call.answer["model_version"] for call in load.acknowledged("rank")} == set(versions)
    check_answers(load, shop.reference, shop.scenario, shop.client)


def test_a_new_deployment_takes_over_and_no_request_fails(shop: Shop) -> None:
    before = processes(RANKING).keys() | processes(ENCODER).keys()
    changed = {"max_candidates": 1_999, "max_body_bytes": 11_000_000, "port": urlsplit(shop.url).port}
    scenario = shop.scenario.model_copy(update={"serving": shop.scenario.serving.model_copy(update=changed)})
    with shop.new_load("deployment") as load:
        load.wait_for_more(10)
        assert local.start(scenario) == shop.url
        until(shop.healthy, "the new replicas do not come")
        until(lambda: not before & (processes(RANKING).keys() | processes(ENCODER).keys()), "the old ones do not go")
        load.wait_for_more(20)
    print(load.told())
    assert [call for call in load.calls if call.failed] == []
    check_answers(load, shop.reference, shop.scenario, shop.client)


@pytest.mark.parametrize("damage", [without_network, with_nan, with_damaged_snapshot])
def test_a_release_that_cannot_be_served_is_refused_and_the_one_before_goes_on(
    shop: Shop, damage: Callable[[str], dict[str, str]]
) -> None:
    center, root = Served.of(shop.scenario).center, artifacts.run_root(shop.scenario)
    good = read_release(center)
    assert good is not None
    names = {"encoder_version": good.encoder_version, "snapshot": good.snapshot, "ctr_model": good.ctr_model}
    with shop.new_load(damage.__name__) as load:
        load.wait_for_more(10)
        promote(center, **names | {"encoder": good.encoder} | damage(root))
        with pytest.raises(ArtifactError) as refused:
            load_current(shop.scenario)
        load.wait_for_more(20)
        promote(center, **names, encoder=good.encoder)
        load_current(shop.scenario)
        load.wait_for_more(10)
    print(load.told(), refused.value)
    assert [call for call in load.calls if call.failed] == []
    assert {call.answer["model_version"] for call in load.acknowledged("rank")} == {shop.version}
    check_answers(load, shop.reference, shop.scenario, shop.client)
