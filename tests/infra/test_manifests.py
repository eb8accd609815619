"""The files in infra/ against typed models of the Kubernetes and KubeRay fields they use: a misspelt field is an error."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema

from mim_ray.config import load_scenario
from mim_ray.runtime.cluster import SERVE_ENVIRONMENT

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str = Field(default="", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40)
    labels: dict[str, str] = {}


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurity(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: int = Field(ge=1)
    runAsGroup: int
    fsGroup: int
    seccompProfile: Seccomp


class Quantities(Strict):
    cpu: str = Field(pattern=r"^\d+m?$")
    memory: str = Field(pattern=r"^\d+[GM]i$")


class Resources(Strict):
    requests: Quantities
    limits: Quantities


class VolumeMount(Strict):
    name: str
    mountPath: str = Field(pattern="^/")
    readOnly: Literal[True]


class Secret(Strict):
    secretName: str


class Volume(Strict):
    name: str
    secret: Secret


class Variable(Strict):
    name: str
    value: str


class Container(Strict):
    name: str
    image: str
    env: list[Variable] = []
    volumeMounts: list[VolumeMount] = []
    securityContext: ContainerSecurity
    resources: Resources


class PodSpec(Strict):
    serviceAccountName: str
    restartPolicy: Literal["Always", "Never", "OnFailure"] | None = None
    securityContext: PodSecurity
    volumes: list[Volume] = []
    containers: list[Container] = Field(min_length=1)


class PodTemplate(Strict):
    metadata: Metadata
    spec: PodSpec


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]

    @property
    def pods(self) -> list[PodTemplate]:
        return [self.headGroupSpec.template, *(group.template for group in self.workerGroupSpecs)]


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(Strict):
    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool
    rayClusterConfig: RayClusterSpec


class RayService(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class LabelSelector(Strict):
    matchLabels: dict[str, str] = {}


class Peer(Strict):
    podSelector: LabelSelector
    namespaceSelector: LabelSelector | None = None


class Port(Strict):
    protocol: Literal["TCP"]
    port: int


class IngressRule(Strict):
    model_config = ConfigDict(populate_by_name=True)
    from_: list[Peer] = Field(alias="from", min_length=1)
    ports: list[Port] | None = None


class NetworkPolicySpec(Strict):
    podSelector: LabelSelector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[IngressRule]


class NetworkPolicy(Strict):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


def read(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


@pytest.fixture
def job() -> RayJob:
    return RayJob.model_validate(read("rayjob.yaml"))


@pytest.fixture
def service() -> RayService:
    return RayService.model_validate(read("rayservice.yaml"))


@pytest.fixture
def policy() -> NetworkPolicy:
    return NetworkPolicy.model_validate(read("networkpolicy.yaml"))


def test_every_manifest_is_checked_here():
    assert {path.name for path in INFRA.glob("*.yaml")} == {
        "rayjob.yaml",
        "rayservice.yaml",
        "networkpolicy.yaml",
        "prometheus-rules.yaml",  # test_dashboards.py
    }


def test_the_clusters_run_the_pinned_ray_in_our_image_behind_a_token(job, service):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert pinned is not None
    for cluster in (job.spec.rayClusterSpec, service.spec.rayClusterConfig):
        assert cluster.rayVersion == pinned[1]
        assert cluster.authOptions.mode == "token"
        for pod in cluster.pods:
            assert [container.image for container in pod.spec.containers] == [f"mim-ray:{project['version']}"]


def test_containers_have_no_rights_they_do_not_need(job, service):
    for cluster in (job.spec.rayClusterSpec, service.spec.rayClusterConfig):
        for pod in cluster.pods:
            assert pod.spec.securityContext.runAsUser == 1000  # USER of the Containerfile
            assert all(container.securityContext.capabilities.drop == ["ALL"] for container in pod.spec.containers)


def test_the_jobs_command_names_a_job_and_known_settings(job):
    words = shlex.split(job.spec.entrypoint)
    assert words[0] == "python"
    assert (ROOT / words[1]).is_file()
    assert words[2:4] == ["--config", "tiny"]
    scenario = load_scenario("tiny", words[4:])
    assert scenario.run.root is not None
    assert scenario.run.root.startswith("s3://")


def test_a_sidecar_submitter_needs_a_head_that_is_not_restarted(job):
    assert job.spec.submissionMode == "SidecarMode"
    assert job.spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy == "Never"


def serve_configs() -> list[tuple[str, dict[str, Any]]]:
    inner = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    return [("rayservice", inner), ("app.yaml", yaml.safe_load((ROOT / "serve" / "app.yaml").read_text()))]


@pytest.mark.parametrize(("name", "config"), serve_configs())
def test_serve_configurations_name_builders_and_settings_that_exist(name, config):
    parsed = ServeDeploySchema.model_validate(config)
    assert [app.name for app in parsed.applications] == ["ranking", "new_item_encoder"]
    assert [app.route_prefix for app in parsed.applications] == ["/", "/v1/items"]
    known = {"config", "ctr", "encoder", "snapshot"}
    for app in parsed.applications:
        module, _, function = app.import_path.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        overrides = [f"{key}={value}" for key, value in app.args.items() if key not in known]
        load_scenario(app.args["config"], overrides)


def test_pods_that_others_reach_have_the_keys_that_the_apps_ask_for(service):
    config = yaml.safe_load(service.spec.serveConfigV2)
    assert config["http_options"]["host"] == "0.0.0.0"
    for app in config["applications"]:
        keys = Path(load_scenario("tiny", [f"serving.keys_file={app['args']['serving.keys_file']}"]).serving.keys_file)
        for pod in service.spec.rayClusterConfig.pods:
            (container,) = pod.spec.containers
            mounted = {mount.mountPath: mount.name for mount in container.volumeMounts}
            assert mounted[str(keys.parent)] in {volume.name for volume in pod.spec.volumes}


def test_the_service_is_on_the_fast_path_and_the_page_says_how(service):
    for pod in service.spec.rayClusterConfig.pods:
        (container,) = pod.spec.containers
        asked = {variable.name: variable.value for variable in container.env}
        assert asked == {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
        assert all(hasattr(constants, name) for name in asked), "Ray Serve knows it no more"
    line = " ".join(f"{name}={value}" for name, value in asked.items())
    assert f"export {line}\n" in (ROOT / "docs" / "cluster.md").read_text()


def test_the_local_configuration_listens_on_this_machine_only():
    config = yaml.safe_load((ROOT / "serve" / "app.yaml").read_text())
    assert config["http_options"]["host"] == "127.0.0.1"


def test_strangers_reach_no_port_and_labelled_clients_only_serve(policy, job, service):
    assert policy.spec.policyTypes == ["Ingress"]
    label = policy.spec.podSelector.matchLabels
    for cluster in (job.spec.rayClusterSpec, service.spec.rayClusterConfig):
        assert all(label.items() <= pod.metadata.labels.items() for pod in cluster.pods)
    opened = {}
    for rule in policy.spec.ingress:
        for peer in rule.from_:
            assert peer.podSelector.matchLabels, "a rule without a pod label lets everybody in"
            opened[next(iter(peer.podSelector.matchLabels))] = {port.port for port in rule.ports or []} or "all"
    assert opened == {"app": "all", "app.kubernetes.io/name": {8265, 8000}, "mim-ray/client": {8000}}


def test_the_image_is_pinned_and_not_run_by_root():
    lines = (INFRA / "Containerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if re.match(r"^[A-Z]+ ", line)]
    assert [words[1] for words in instructions if words[0] == "FROM"] == ["python:3.11-slim-bookworm"]
    assert [words[1] for words in instructions if words[0] == "USER"] == ["1000:100"]
    copied = [word for words in instructions if words[0] == "COPY" for word in words[1].split()[:-1]]
    assert all((ROOT / path).exists() for path in copied), copied
    assert any("-r requirements.lock" in line for line in lines)
    uv = re.search(r"UV_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert uv is not None
    assert any(f"uv=={uv[1]}" in line for line in lines)


def test_the_image_and_the_documented_command_set_for_serve_what_the_embedded_ray_does():
    for text in ((INFRA / "Containerfile").read_text(), (ROOT / "docs" / "cluster.md").read_text()):
        for name, value in SERVE_ENVIRONMENT.items():
            assert re.search(rf"\b{name}={value}\s", text), name
            known = {name, name.removeprefix("RAY_SERVE_")}
            assert any(hasattr(constants, one) for one in known), "Ray Serve knows it no more"
