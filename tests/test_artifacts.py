import pickle
from pathlib import Path

import pytest
import torch

from mim_ray import artifacts, errors
from mim_ray.config import load_scenario
from mim_ray.errors import ArtifactError, ConfigError


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_json_and_tensors_come_back_from_paths_and_uris(tmp_path: Path, prefix: str) -> None:
    root = f"{prefix}{tmp_path}"
    artifacts.write_json(f"{root}/a/b.json", {"x": [1, 2.5]})
    weights = torch.arange(6.0).reshape(2, 3)
    artifacts.write_tensors(f"{root}/a/w.safetensors", {"first": weights, "shared": weights.t()})
    assert artifacts.read_json(f"{root}/a/b.json") == {"x": [1, 2.5]}
    loaded = artifacts.read_tensors(f"{root}/a/w.safetensors")
    assert torch.equal(loaded["first"], weights)
    assert torch.equal(loaded["shared"], weights.t())
    assert artifacts.list_files(root, ".json") == [f"{root}/a/b.json"]
    artifacts.remove(f"{root}/a")
    assert not artifacts.exists(f"{root}/a")


def test_missing_and_damaged_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Run the stage that makes it first"):
        artifacts.read_json(f"{tmp_path}/none.json")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ArtifactError, match="is damaged"):
        artifacts.read_tensors(f"{tmp_path}/bad.safetensors")


def test_json_refuses_nan_instead_of_writing_what_no_parser_reads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(f"{tmp_path}/x.json", {"loss": float("nan")})


def test_a_relative_root_is_refused_in_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifacts.absolute_uri("some/where") == str(Path.cwd() / "some/where")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"relative path.*absolute path or a URI"):
        artifacts.absolute_uri("some/where")
    assert artifacts.absolute_uri("s3://bucket/x/") == "s3://bucket/x"
    assert Path(artifacts.run_root(load_scenario("tiny"))).is_absolute()


def test_a_source_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "a").write_text("1")
    first = artifacts.source_fingerprint(str(tmp_path / "items"))
    assert first == artifacts.source_fingerprint(str(tmp_path / "items"))
    (tmp_path / "items" / "a").write_text("22")
    assert first != artifacts.source_fingerprint(str(tmp_path / "items"))


def test_every_error_survives_pickling() -> None:
    """Ray carries errors from workers to the driver by pickle."""
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(kinds) > 5
    for kind in kinds:
        error = kind("a sentence")
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert type(copy) is kind
        assert str(copy) == "a sentence"
    assert pickle.loads(pickle.dumps(errors.RequestError("no", 413))).status == 413  # noqa: S301
