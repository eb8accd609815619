"""mim_ray/serving/promotion.py and jobs/promote.py: two encoder versions side by side, switched and switched back."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from mim_ray import artifacts
from mim_ray.encoders.item_encoder import ItemEncoder
from mim_ray.errors import ArtifactError, ConfigError, VersionMismatchError
from mim_ray.pipeline.promote import main
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.release import read_release, releases
from mim_ray.representation_center.snapshot_line import list_snapshots
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import fold
from mim_ray.serving.new_item_app import bind_new_item_encoder, new_item_api
from mim_ray.serving.new_item_encoder import NewItemEncoder
from mim_ray.serving.promotion import promote_version, return_to
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import bind_ranking
from mim_ray.serving.served import Served

NEW = "csft-of-tomorrow"


@pytest.fixture
def two_versions(small_run: Any) -> Any:
    """The run, its center holding a second encoder version; a model trained on that one at ctr/new-mim."""
    root = small_run.root
    table = EmbeddingTable(f"{root}/center/table")
    old = table.encoder_versions()[0]
    rows = table.current_rows(old).drop_columns(["encoder_version", "commit_version", "shard_id", "origin"])
    table.append(rows, encoder_version=NEW, shard_id="s0")
    build_snapshot(table, NEW, f"{root}/center/snapshots/{NEW}")
    shutil.copytree(root / "ctr" / "sim-mim", root / "ctr" / "new-mim")
    info = json.loads((root / "ctr" / "new-mim" / "ctr.json").read_text())
    (root / "ctr" / "new-mim" / "ctr.json").write_text(json.dumps(info | {"encoder_version": NEW}))
    return small_run, old


def words(run: Any, *more: str) -> list[str]:
    return ["--config", "tiny", f"run.root={run.root}", *more]


def served_scores(run: Any) -> tuple[str, str]:
    """Encoder version of the model that serves, and of the embeddings that it is given."""
    service = RankingService.open(Served.of(run.scenario), run.scenario.serving)
    service.embeddings.stop()
    return service.model.encoder_version, service.embeddings.encoder_version


def test_a_new_version_fills_beside_the_old_and_serving_changes_with_the_release(two_versions: Any) -> None:
    run, old = two_versions
    assert served_scores(run) == (old, old)
    first = promote_version(run.scenario)
    assert first.encoder == f"{run.root}/csft/encoder"
    (state,) = list_snapshots(f"{run.root}/center/snapshots/{old}")
    assert (first.encoder_version, first.snapshot, first.ctr_model) == (old, state.uri, f"{run.root}/ctr/sim-mim")
    assert Served.of(run.scenario).release == 1
    second = promote_version(run.scenario, NEW, ctr="new-mim")
    assert second.encoder is None
    assert served_scores(run) == (NEW, NEW)
    bind_ranking(run.scenario)
    with pytest.raises(VersionMismatchError) as met:  # the run's encoder is the old one
        bind_new_item_encoder(run.scenario)
    assert old in str(met.value)
    assert NEW in str(met.value)
    return_to(run.scenario)
    assert served_scores(run) == (old, old)
    bind_new_item_encoder(run.scenario)
    return_to(run.scenario, 2)
    assert served_scores(run) == (NEW, NEW)
    assert Served.of_run(run.scenario).snapshot.endswith(old)  # the run itself is not touched


def test_a_release_names_one_state_that_refreshes_do_not_change_or_prune(two_versions: Any) -> None:
    run, old = two_versions
    line = f"{run.root}/center/snapshots/{old}"
    table = EmbeddingTable(f"{run.root}/center/table")
    first = promote_version(run.scenario)
    for _ in range(4):
        build_snapshot(table, old, line, keep=1)
    assert Served.of(run.scenario).snapshot == first.snapshot
    assert first.snapshot in [state.uri for state in list_snapshots(line)]
    assert len(list_snapshots(line)) == 2
    for _ in range(3):  # three newer releases: the first one's state may go
        promote_version(run.scenario)
        build_snapshot(table, old, line, keep=1)
    assert first.snapshot not in [state.uri for state in list_snapshots(line)]
    with pytest.raises(ArtifactError, match="has no snapshot"):
        return_to(run.scenario, 1)


def test_what_does_not_belong_together_is_refused_naming_both(two_versions: Any) -> None:
    run, old = two_versions
    for version, ctr in ((NEW, "sim-mim"), (old, "new-mim"), (NEW, None)):
        with pytest.raises(VersionMismatchError) as met:
            promote_version(run.scenario, version, ctr=ctr)
        assert old in str(met.value)
        assert NEW in str(met.value)
    assert releases(f"{run.root}/center") == []
    promote_version(run.scenario, NEW, ctr="none")
    with pytest.raises(VersionMismatchError, match=old) as met:  # the run's own model with the release's embeddings
        bind_ranking(run.scenario)
    assert NEW in str(met.value)
    with pytest.raises(VersionMismatchError):
        RankingService.open(Served.of(run.scenario), run.scenario.serving)
    promote_version(run.scenario, NEW, ctr="new-mim")
    asked = run.scenario.serving.model_copy(update={"variant": "din-mim"})
    with pytest.raises(ConfigError, match=r"serving\.variant = din-mim, but release 2 names"):
        Served.of(run.scenario.model_copy(update={"serving": asked}))


def test_a_damaged_or_missing_part_is_refused(two_versions: Any) -> None:
    run, _ = two_versions
    first = promote_version(run.scenario)
    promote_version(run.scenario, NEW, ctr="new-mim")
    matrix = artifacts.local_path(f"{first.snapshot}/matrix.bin")
    content = bytearray(matrix.read_bytes())
    content[5] ^= 1
    matrix.write_bytes(content)
    for switch in (lambda: promote_version(run.scenario), lambda: return_to(run.scenario)):
        with pytest.raises(ArtifactError, match="is damaged"):
            switch()
    shutil.rmtree(run.root / "ctr" / "new-mim")
    with pytest.raises(ArtifactError, match=r"new-mim/ctr\.json is not there"):
        return_to(run.scenario, 2)
    current = read_release(f"{run.root}/center")
    assert current is not None
    assert current.number == 2


def test_the_job_shows_switches_and_returns(two_versions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, old = two_versions
    main("doc", words(run))
    assert "nothing was promoted yet" in capsys.readouterr().out
    main("doc", words(run, "promote"))
    main("doc", words(run, "promote"))
    assert "posted" not in capsys.readouterr().out, "the encoder version is the same"
    main("doc", words(run, "promote", NEW, "--ctr", "new-mim"))
    out = capsys.readouterr().out
    assert f"The encoder version before was {old}. Items that were posted to /v1/items under it" in out
    main("doc", words(run, "show"))
    out = capsys.readouterr().out
    assert NEW in out
    assert old in out
    assert "<- current release" in out
    main("doc", words(run, "back"))
    out = capsys.readouterr().out
    assert "4, again 2" in out
    assert f"The encoder version before was {NEW}" in out
    main("doc", words(run, "list"))
    assert "4 current" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["promot"], r"'promot' is no command; did you mean 'promote'\?"),
        (["promote", "csft-none"], r"has no snapshot of encoder version csft-none \(it has: .*csft-of-tomorrow"),
        (["promote", NEW, "--snapshot", "x"], r"has no snapshot x \(it has: 2"),
        (["promote", NEW, "--ctr", "din-mim"], r"din-mim/ctr\.json is not there"),
        (["promote", "../x"], r"has no snapshot of encoder version \.\./x"),
        (["back"], "no release before the current one"),
        (["back", "--to", "7"], "knows no release 7"),
        (["show", "extra"], "show does not take 'extra'"),
        (["list", "--to", "3"], "--to belongs to the command back"),
        (["serving.variannt=x"], "did you mean 'serving.variant'"),
    ],
)
def test_a_mistake_is_a_sentence(
    two_versions: Any, wrong: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as met:
        main("doc", words(two_versions[0], *wrong))
    assert met.value.code == 2
    err = capsys.readouterr().err
    assert re.search(sentence, err), err
    assert "Traceback" not in err


def test_runs_may_share_a_center(two_versions: Any, tmp_path: Any) -> None:
    """A second run fills and promotes in the center of the first; the first serves the release."""
    run, old = two_versions
    other = tmp_path / "run2"
    shutil.copytree(run.root / "ctr" / "new-mim", other / "ctr" / "sim-mim")
    manifest = artifacts.read_manifest(f"{run.root}/extraction")
    metrics = {"snapshot": f"{run.root}/center/snapshots/{NEW}", "encoder_version": NEW}
    artifacts.write_manifest(f"{other}/extraction", type(manifest)(**{**vars(manifest), "metrics": metrics}))
    main("doc", words(run, "promote"))
    main("doc", ["--config", "tiny", f"run.root={other}", f"run.center={run.root}/center", "promote"])
    assert served_scores(run) == (NEW, NEW)
    assert Served.of(run.scenario).ctr == f"{other}/ctr/sim-mim"
    main("doc", words(run, "back"))
    assert served_scores(run) == (old, old)


def test_a_center_on_s3_is_filled_promoted_served_and_written_by_the_new_item_encoder(
    two_versions: Any, s3: Any
) -> None:
    run, old = two_versions
    center = f"{s3.uri}/center"
    local = EmbeddingTable(f"{run.root}/center/table")
    table = EmbeddingTable(f"{center}/table").create()
    for version in (old, NEW):
        rows = local.current_rows(version).drop_columns(["encoder_version", "commit_version", "shard_id", "origin"])
        table.append(rows, encoder_version=version, shard_id="s0")
        build_snapshot(table, version, f"{center}/snapshots/{version}")
    settings = run.scenario.run.model_copy(update={"center": center})
    there = replace(run, scenario=run.scenario.model_copy(update={"run": settings}))
    promote_version(there.scenario, NEW, ctr="new-mim")
    promote_version(there.scenario, old)
    assert Served.of(there.scenario).snapshot.startswith(f"{center}/snapshots/{old}/")
    assert served_scores(there) == (old, old)
    return_to(there.scenario)
    assert served_scores(there) == (NEW, NEW)
    return_to(there.scenario, 2)

    served = Served.of(there.scenario)
    encoder = NewItemEncoder(ItemEncoder.load(served.encoder), served.center, run.scenario.data)
    answer = TestClient(new_item_api(encoder, run.scenario.serving)).post(
        "/v1/items", json={"item_id": "n", "title": "red mug"}
    )
    assert answer.status_code == 200, answer.text
    service = RankingService.open(served, run.scenario.serving)
    service.embeddings.stop()
    assert service.embeddings.multi_get(["n", "i1"])[1].tolist() == [True, True]
    assert fold(f"{center}/window", table).num_rows == 1
    assert table.current_rows(old).num_rows == 41
