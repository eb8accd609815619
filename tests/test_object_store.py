"""s3://: mim_ray/object_store.py and mim_ray/artifacts.py, against an S3 API server on loopback."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mim_ray import artifacts
from mim_ray.config import load_scenario
from mim_ray.config.load import describe_keys
from mim_ray.data.rejects import read_rejects, reject_rows, write_rejects
from mim_ray.data.sources import require_table, shards
from mim_ray.errors import ArtifactError, ConfigError, DataError, StorageError
from mim_ray.object_store import delta_options, storage_error
from mim_ray.representation_center.table import EmbeddingTable


def test_files_json_and_tensors_come_back(s3: Any, tmp_path: Path) -> None:
    root = s3.uri
    assert artifacts.list_files(root) == []
    assert not artifacts.exists(root)
    artifacts.write_json(f"{root}/a/b.json", {"x": [1, 2.5]})
    artifacts.write_json(f"{root}/a/b.json", {"x": 3})
    weights = torch.arange(6.0).reshape(2, 3)
    artifacts.write_tensors(f"{root}/a/c/w.safetensors", {"w": weights})
    artifacts.write_bytes(f"{root}/a2", b"beside")
    assert artifacts.read_json(f"{root}/a/b.json") == {"x": 3}
    assert torch.equal(artifacts.read_tensors(f"{root}/a/c/w.safetensors")["w"], weights)
    assert artifacts.list_files(f"{root}/a") == [f"{root}/a/b.json", f"{root}/a/c/w.safetensors"]
    assert artifacts.list_files(f"{root}/a/", ".json") == [f"{root}/a//b.json".replace("//b", "/b")]
    assert artifacts.list_files(f"{root}/a2") == [f"{root}/a2"]
    assert artifacts.exists(f"{root}/a")
    first = artifacts.source_fingerprint(f"{root}/a")
    copy = artifacts.local_copy(f"{root}/a")
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*.*")) == ["b.json", "c/w.safetensors"]
    assert artifacts.local_copy(f"{root}/a") == copy
    assert artifacts.local_copy(f"{root}/a/b.json").read_text() == '{\n "x": 3\n}'
    artifacts.write_json(f"{root}/a/b.json", {"x": "longer"})
    assert artifacts.source_fingerprint(f"{root}/a") != first
    artifacts.remove(f"{root}/a")
    assert not artifacts.exists(f"{root}/a")
    assert artifacts.read_bytes(f"{root}/a2") == b"beside"
    with pytest.raises(ArtifactError, match="is not there"):
        artifacts.read_bytes(f"{root}/a/b.json")


def test_a_small_file_is_one_put_and_a_listing_one_request(s3: Any) -> None:
    artifacts.write_bytes(f"{s3.uri}/window/v1/segment.arrow", b"x" * 100_000)
    assert [line.partition(" ")[0] for line in s3.requests()] == ["PUT"]
    for number in range(30):
        artifacts.write_bytes(f"{s3.uri}/window/v{number % 3}/{number}.arrow", b"x")
    s3.requests()
    assert len(artifacts.list_files(f"{s3.uri}/window")) == 31
    assert len(s3.requests()) == 1


def test_large_files_and_rejects_come_back(s3: Any, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4 * 2**13  # 8 MiB, in several parts
    artifacts.write_bytes(f"{s3.uri}/large", content)
    assert artifacts.read_bytes(f"{s3.uri}/large") == content
    artifacts.download(f"{s3.uri}/large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == content
    uri = f"{s3.uri}/rejects"
    assert read_rejects(uri).num_rows == 0
    assert write_rejects(uri, "b", reject_rows("b", "items", [("k", "bad", "why")] * 3)) == {"bad": 3}
    write_rejects(uri, "b", reject_rows("b", "items", [("k", "worse", "why")]))
    write_rejects(uri, "c", reject_rows("c", "items", []))
    assert read_rejects(uri, "b")["reason"].to_pylist() == ["worse"]


@pytest.mark.parametrize("names", [("AWS_ENDPOINT_URL", "AWS_REGION"), ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")])
def test_both_libraries_obey_the_same_variables(
    s3: Any, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    for name, value in zip(names, ("AWS_ENDPOINT_URL", "AWS_REGION"), strict=True):
        monkeypatch.delenv(value)
        monkeypatch.setenv(name, s3.env[value])
    artifacts.write_bytes(f"{s3.uri}/file", b"x")
    assert delta_options(s3.uri) == {"AWS_REGION": s3.env["AWS_REGION"], "AWS_ALLOW_HTTP": "true"}
    assert EmbeddingTable(f"{s3.uri}/table").create().version == 0
    assert delta_options("/a/path") is None


def test_a_store_without_conditional_writes_is_refused(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.set_conditional_writes(False)
    try:
        with pytest.raises(StorageError, match=r"no conditional writes.*two jobs.*AWS_S3_LOCKING_PROVIDER"):
            EmbeddingTable(f"{s3.uri}/table").create()
    finally:
        s3.set_conditional_writes(True)
    assert artifacts.list_files(s3.uri) == []
    EmbeddingTable(f"{s3.uri}/table").create()
    assert not [file for file in artifacts.list_files(s3.uri) if "/table/_delta_log/" not in file]
    monkeypatch.setenv("AWS_S3_ALLOW_UNSAFE_RENAME", "true")
    with pytest.raises(ConfigError, match="would lose rows"):
        EmbeddingTable(f"{s3.uri}/table").create()


def test_a_store_that_is_away_or_refuses_is_a_sentence_without_secrets(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"cannot be reached or refuses.*Check the bucket's name") as met:
        artifacts.write_bytes("s3://mim-ray-no-such-bucket/x", b"x")
    assert s3.secret not in str(met.value)
    assert "AWS_SECRET_ACCESS_KEY is set" in str(met.value)
    with pytest.raises(StorageError, match="cannot be reached or refuses"):
        EmbeddingTable("s3://mim-ray-no-such-bucket/x").create()


def test_an_error_of_a_ray_worker_is_told_by_its_last_line() -> None:
    text = "ray::f() (pid=1)\n  File x, line 1\n    raise\nOSError: When reading 'k' in bucket 'b': AWS Error ACCESS_DENIED."
    told = storage_error(OSError(text))
    assert told is not None
    assert re.search(r"refuses: When reading 'k' in bucket 'b': AWS Error ACCESS_DENIED\. Check", str(told))
    assert storage_error(OSError("disk full")) is None
    assert storage_error(ValueError("AWS Error")) is None
    assert storage_error(FileNotFoundError(2, "no"), "s3://b/x") is None


def test_clients_travel_to_workers_without_credentials(s3: Any) -> None:
    artifacts.write_bytes(f"{s3.uri}/file", b"x")
    filesystem, path = artifacts.filesystem(f"{s3.uri}/file")
    assert artifacts.filesystem(f"{s3.uri}/other")[0] is filesystem
    sent = pickle.dumps(filesystem)
    assert s3.secret.encode() not in sent
    assert s3.env["AWS_ACCESS_KEY_ID"].encode() not in sent
    assert pickle.loads(sent).open_input_stream(path).read() == b"x"  # noqa: S301


SECRET_ADDRESSES = [
    "s3://AKIAKEY:hidden@bucket/run",
    "s3://hidden@bucket/run",
    "s3://bucket/run?access_key=a&secret_key=hidden",
    "gs://x:hidden@bucket/run",
]


@pytest.mark.parametrize("address", SECRET_ADDRESSES)
def test_a_scenario_with_credentials_is_refused_and_they_are_not_repeated(address: str, tmp_path: Path) -> None:
    for key in ("run.root", "data.root", "data.images_root", "encoders.vision.weights"):
        with pytest.raises(ConfigError, match="holds credentials, from the command line") as met:
            load_scenario("tiny", [f"{key}={address}", "csft.steps=-1"])
        assert "hidden" not in str(met.value)
    section, _, name = "data.root".partition(".")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({section: {name: address}}))
    with pytest.raises(ConfigError, match=r"data\.root holds credentials, from .*mine\.yaml") as met:
        load_scenario(str(tmp_path / "mine.yaml"))
    assert "hidden" not in str(met.value)
    for call in (artifacts.absolute_uri, artifacts.exists, artifacts.read_bytes):
        with pytest.raises(ConfigError, match="holds credentials") as met:
            call(address)
        assert "hidden" not in str(met.value)


def test_no_setting_takes_credentials() -> None:
    with pytest.raises(ConfigError, match=r"run\.aws_secret_access_key holds credentials") as met:
        load_scenario("tiny", ["run.aws_secret_access_key=hidden"])
    assert "hidden" not in str(met.value)
    keys = [line.partition(" = ")[0] for line in describe_keys()]
    assert not [key for key in keys if any(word in key for word in ("secret", "password", "credential", "access_key"))]
    assert load_scenario("tiny", ["run.root=s3://bucket/a@b"]).run.root == "s3://bucket/a@b"


def test_a_catalogue_is_read_as_parquet_and_as_delta(s3: Any) -> None:
    rows = pa.table({"item_id": ["a", "b", "c"], "title": ["x", None, "z"]})
    deltalake.write_deltalake(f"{s3.uri}/delta/items", rows, storage_options=delta_options(s3.uri))
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    artifacts.write_bytes(f"{s3.uri}/parquet/items.parquet", sink.getvalue().to_pybytes())
    for kind in ("delta", "parquet"):
        (shard,) = shards(require_table(f"{s3.uri}/{kind}", "items"), "items")
        sent = pickle.loads(pickle.dumps(shard))  # noqa: S301  (Ray sends it to a worker)
        assert sent.read(["item_id", "title", "category"]).to_pydict()["title"] == ["x", None, "z"]
    with pytest.raises(DataError, match=r"has no table items"):
        require_table(f"{s3.uri}/nothing", "items")
