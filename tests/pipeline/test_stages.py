from pathlib import Path

import pytest

from mim_ray import artifacts
from mim_ray.config import Scenario, load_scenario
from mim_ray.pipeline.graph import pipeline
from mim_ray.pipeline.layout import Layout
from mim_ray.pipeline.stages import Pipeline, Stage
from mim_ray.runtime.summary import StageResult

pytestmark = pytest.mark.ray


class Recorder:
    """Stage functions that write a file and remember that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail: str | None = None

    def stage(self, name: str, sections: tuple[str, ...], parents: tuple[str, ...], resumes: bool = False) -> Stage:
        def run(scenario: Scenario, layout: Layout) -> StageResult:
            self.ran.append(name)
            artifacts.write_json(f"{layout.stage(name)}/partial-{len(self.ran)}.json", 1)
            if self.fail == name:
                raise RuntimeError("killed")
            return StageResult(metrics={"value": 1}, rows=[("rows", "1")])

        return Stage(name, name, sections, parents, run, resumes=resumes)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def chain(recorder: Recorder, root: Path, *overrides: str) -> Pipeline:
    scenario = load_scenario("tiny", [f"run.root={root}", *overrides])
    stages = [
        recorder.stage("first", ("pretraining",), ()),
        recorder.stage("second", ("csft",), ("first",), resumes=True),
        recorder.stage("third", ("ciubm.variants", "evaluation"), ("second",)),
    ]
    return Pipeline(scenario, stages)


def test_a_target_runs_its_missing_parents_first_and_is_reused_then(
    ray_cluster: None, recorder: Recorder, tmp_path: Path
) -> None:
    chain(recorder, tmp_path).run(["second"])
    assert recorder.ran == ["first", "second"]
    manifests = chain(recorder, tmp_path).run(["third"])
    assert recorder.ran == ["first", "second", "third"]
    assert set(manifests) == {"first", "second", "third"}
    assert manifests["third"].parents == {"second": manifests["second"].fingerprint}


def test_a_changed_setting_reruns_the_stage_and_what_is_made_from_it(
    ray_cluster: None, recorder: Recorder, tmp_path: Path
) -> None:
    chain(recorder, tmp_path).run(["third"])
    assert chain(recorder, tmp_path, "csft.steps=7").plan(["third"]) == ["second", "third"]
    assert chain(recorder, tmp_path, "run.seed=7").plan(["third"]) == ["first", "second", "third"]
    assert chain(recorder, tmp_path, "evaluation.num_bootstrap=7").plan(["third"]) == ["third"]


def test_a_stage_that_another_run_finished_alike_is_read_there(
    ray_cluster: None, recorder: Recorder, tmp_path: Path
) -> None:
    chain(recorder, tmp_path / "one").run(["second"])
    other = chain(recorder, tmp_path / "two", f"run.reuse=[{tmp_path}/none,{tmp_path}/one]", "csft.steps=7")
    assert other.plan(["third"]) == ["second", "third"]
    other.run(["third"])
    assert recorder.ran == ["first", "second", "second", "third"]
    assert other.layout.stage("first") == f"{tmp_path}/one/first"
    assert other.layout.encoder("dda") == f"{tmp_path}/two/pretraining/dda"
    assert other.layout.stage("second") == f"{tmp_path}/two/second"
    assert len(list((tmp_path / "one" / "second").glob("partial-*"))) == 1


def test_settings_of_execution_do_not_rerun_anything(ray_cluster: None, recorder: Recorder, tmp_path: Path) -> None:
    chain(recorder, tmp_path).run(["third"])
    assert (
        chain(recorder, tmp_path, "csft.threads_per_worker=1", "csft.max_failures=0", "run.num_cpus=2").plan(["third"])
        == []
    )


def test_an_interrupted_stage_runs_again_and_keeps_its_files_only_if_it_resumes(
    ray_cluster: None, recorder: Recorder, tmp_path: Path
) -> None:
    for name, kept in (("first", False), ("second", True)):
        recorder.fail = name
        with pytest.raises(RuntimeError, match="killed"):
            chain(recorder, tmp_path).run([name])
        assert artifacts.read_manifest(f"{tmp_path}/{name}") is None
        before = list((tmp_path / name).glob("partial-*"))
        recorder.fail = None
        chain(recorder, tmp_path).run([name])
        assert all(path.exists() == kept for path in before)


def test_an_interrupted_attempt_with_other_settings_is_not_resumed(
    ray_cluster: None, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.fail = "second"
    with pytest.raises(RuntimeError, match="killed"):
        chain(recorder, tmp_path).run(["second"])
    before = list((tmp_path / "second").glob("partial-*"))
    recorder.fail = None
    chain(recorder, tmp_path, "csft.steps=7").run(["second"])
    assert before
    assert not any(path.exists() for path in before)


def test_an_interrupted_attempt_goes_on_with_another_number_of_workers(
    ray_cluster: None, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.fail = "second"
    with pytest.raises(RuntimeError, match="killed"):
        chain(recorder, tmp_path).run(["second"])
    before = list((tmp_path / "second").glob("partial-*"))
    recorder.fail = None
    first = chain(recorder, tmp_path)
    first.run(["first"])
    other = chain(recorder, tmp_path, "csft.num_workers=3")
    other.run(["second"])
    assert before
    assert all(path.exists() for path in before)
    assert other.finished("second") is not None
    assert first.finished("second") is None  # the outcome is that of three workers


def test_each_encoder_of_table_3_has_its_folder_and_its_stage(tmp_path: Path) -> None:
    layout = Layout("/root", "/data", "/root/center")
    folders = [layout.encoder(stage) for stage in ("untrained", "dda", "pretraining", "csft")]
    names = ("pretraining/untrained", "pretraining/dda", "pretraining/encoder", "csft/encoder")
    assert folders == [f"/root/{name}" for name in names]
    scenario = load_scenario("tiny", [f"run.root={tmp_path}", "extraction.encoder=dda"])
    assert pipeline(scenario).stages["extraction"].parents == ("samples", "pretraining")
