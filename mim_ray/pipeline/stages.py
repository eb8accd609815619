"""The stages of a run, what each is made from, and how a finished one is recognised.

A stage is a function that fills a folder. It runs when its folder holds no complete artifact with the same fingerprint:
a hash of the settings that can change its outcome, of its parents' fingerprints, and of the user's files where it reads
them. So every job may be asked for alone, in any order: what is missing before it is made first, what is there is reused.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import mim_ray
from mim_ray import artifacts
from mim_ray.artifacts import Manifest
from mim_ray.config import Scenario
from mim_ray.data.sources import find_table
from mim_ray.errors import DataError
from mim_ray.pipeline.layout import Layout
from mim_ray.runtime.cluster import cluster
from mim_ray.runtime.progress import format_seconds
from mim_ray.runtime.summary import StageResult, format_summary

# Settings that say how a stage is executed or which stages there are, not what one stage puts out.
_EXECUTION = frozenset({"threads_per_worker", "cpus_per_worker", "max_failures", "use_gpu", "commit_every_s"})
_EXECUTION |= {"num_actors", "cpus_per_actor", "gpus_per_actor", "variants", "in_driver", "checkpoint_every_steps"}
_EXECUTION |= {"num_decoders", "reuse_snapshot"}
_USER_TABLES = ("items", "interactions", "impressions", "interest_pairs")


@dataclass(frozen=True)
class Stage:
    """One box of docs/architecture.md.

    Attributes:
        name: folder below the run's root.
        title: what a person reads.
        sections: scenario sections, or section.key, that change its outcome.
        parents: stages it reads from.
        run: fills the folder; Ray is running when it is called.
        resumes: goes on from what an interrupted attempt left in the folder, if only the number of workers differs.
    """

    name: str
    title: str
    sections: tuple[str, ...]
    parents: tuple[str, ...]
    run: Callable[[Scenario, Layout], StageResult]
    reads_user_tables: bool = False
    resumes: bool = False


class Pipeline:
    """The stages of one scenario and their state on disk."""

    def __init__(self, scenario: Scenario, stages: list[Stage]) -> None:
        self.scenario = scenario
        self.layout = Layout.of(scenario)
        self._reuse = [artifacts.absolute_uri(root) for root in scenario.run.reuse]
        self.stages = {stage.name: stage for stage in stages}
        self._fingerprints: dict[str, str] = {}
        self._source: str | None = None

    def fingerprint(self, name: str) -> str:
        """Hash of everything that the stage's outcome depends on."""
        if name not in self._fingerprints:
            self._fingerprints[name] = artifacts.fingerprint(self._parts(name, frozenset()))
        return self._fingerprints[name]

    def attempt(self, name: str) -> str:
        """The same without how many workers there are: an interrupted attempt may go on with more or fewer of them."""
        return artifacts.fingerprint(self._parts(name, frozenset({"num_workers"})))

    def _parts(self, name: str, leave_out: frozenset[str]) -> dict[str, object]:
        stage = self.stages[name]
        return {
            "stage": name,
            "version": mim_ray.__version__,
            "seed": self.scenario.run.seed,
            "settings": {key: _settings(self.scenario, key, leave_out) for key in stage.sections},
            "parents": {parent: self.fingerprint(parent) for parent in stage.parents},
            "tables": self._user_tables() if stage.reads_user_tables else None,
        }

    def finished(self, name: str) -> Manifest | None:
        """The stage's manifest when what it left, here or in a run named by run.reuse, is complete and still valid."""
        for root in (self.layout.root, *self._reuse):
            manifest = artifacts.read_manifest(f"{root}/{name}")
            if manifest is not None and manifest.fingerprint == self.fingerprint(name):
                if root != self.layout.root:
                    self.layout.elsewhere[name] = f"{root}/{name}"
                return manifest
        return None

    def plan(self, targets: list[str]) -> list[str]:
        """The stages that have to run for `targets`, parents first."""
        order: list[str] = []

        def visit(name: str) -> None:
            if name in order:
                return
            for parent in self.stages[name].parents:
                visit(parent)
            self.fingerprint(name)  # what is wrong with the user's tables is told before anything starts
            order.append(name)

        for target in targets:
            visit(target)
        return [name for name in order if self.finished(name) is None]

    def run(self, targets: list[str]) -> dict[str, Manifest]:
        """Run what is missing for `targets`; the manifests of all stages that are now complete.

        Raises:
            MimRayError: with a sentence for the user, when input or settings do not allow a stage.
        """
        missing = self.plan(targets)
        reused = [name for name in self.stages if name not in missing and self.finished(name) is not None]
        if reused:
            print(f"finished before, reused: {', '.join(reused)}")
        with contextlib.ExitStack() as stack:
            if missing:
                print(f"to run: {', '.join(missing)}   (artifacts in {self.layout.root})", flush=True)
                stack.enter_context(cluster(self.scenario.run))
            for number, name in enumerate(missing, start=1):
                self._run_one(self.stages[name], f"{number}/{len(missing)}")
        for target in targets:
            if target not in missing:
                self._show(self.stages[target], self._manifest(target))
        return {name: manifest for name in self.stages if (manifest := self.finished(name)) is not None}

    def _run_one(self, stage: Stage, number: str) -> None:
        uri = self.layout.stage(stage.name)
        self._prepare(stage, uri)
        print(f"\n[{number}] {stage.title}", flush=True)
        start = time.monotonic()
        result = stage.run(self.scenario, self.layout)
        manifest = Manifest(
            stage=stage.name,
            fingerprint=self.fingerprint(stage.name),
            created_at=artifacts.now(),
            seconds=round(time.monotonic() - start, 2),
            parents={parent: self.fingerprint(parent) for parent in stage.parents},
            metrics=result.metrics,
            summary=[list(row) for row in result.rows],
            rejects=result.rejects,
            scenario=self.scenario.model_dump(mode="json"),
        )
        artifacts.write_manifest(uri, manifest)
        self._show(stage, manifest)

    def _prepare(self, stage: Stage, uri: str) -> None:
        attempt = f"{uri}/attempt.json"
        complete = artifacts.exists(f"{uri}/{artifacts.MANIFEST}")
        same = artifacts.exists(attempt) and artifacts.read_json(attempt) == self.attempt(stage.name)
        if complete or not (stage.resumes and same):
            artifacts.remove(uri)
        artifacts.write_json(attempt, self.attempt(stage.name))

    def _show(self, stage: Stage, manifest: Manifest) -> None:
        rows = [(label, text) for label, text in manifest.summary]
        title = f"{stage.title}: {format_seconds(manifest.seconds)}"
        print(format_summary(title, rows, manifest.rejects), flush=True)

    def _manifest(self, name: str) -> Manifest:
        manifest = self.finished(name)
        assert manifest is not None, name
        return manifest

    def _user_tables(self) -> str | None:
        if self.scenario.data.root is None:
            return None
        if self._source is None:
            found = {name: find_table(self.layout.data_root, name) for name in _USER_TABLES}
            if found["items"] is None:
                raise DataError(
                    f"There is no items table in {self.layout.data_root} (looked for items.parquet and items). "
                    "Set data.root to the folder that holds items and interactions."
                )
            self._source = artifacts.fingerprint(
                {name: artifacts.source_fingerprint(uri) for name, uri in found.items() if uri is not None}
            )
        return self._source


def with_settings(scenario: Scenario, section: str, **values: object) -> Scenario:
    """A copy of the scenario with some settings of one section replaced, validated again."""
    data = scenario.model_dump()
    data[section].update(values)
    return Scenario.model_validate(data)


def _settings(scenario: Scenario, key: str, leave_out: frozenset[str]) -> object:
    section, _, name = key.partition(".")
    values = getattr(scenario, section).model_dump(mode="json")
    if name:
        return values[name]
    return {setting: value for setting, value in values.items() if setting not in _EXECUTION | leave_out}
