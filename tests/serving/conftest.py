"""A finished run in small: an untrained encoder, its embeddings, an untrained CTR model and behaviors, all on disk."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from mim_ray import artifacts
from mim_ray.ciubm.export import save_model
from mim_ray.ciubm.features import Features
from mim_ray.ciubm.model import CtrNetwork
from mim_ray.ciubm.recipe import network_config
from mim_ray.ciubm.tables import IdTables
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary
from mim_ray.config import Scenario, load_scenario
from mim_ray.config.scenario import Serving
from mim_ray.data.transforms import content_hash
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.encoders.tokenizer import train_tokenizer
from mim_ray.representation_center.build import build_snapshot
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import segment_rows
from mim_ray.serving.new_item_app import new_item_api
from mim_ray.serving.new_item_encoder import NewItemEncoder
from mim_ray.serving.query_encoder import QueryEncoder
from mim_ray.serving.ranker import RankingService
from mim_ray.serving.ranking_app import ranking_api
from mim_ray.serving.served import Served
from mim_ray.serving.similar import SimilarItems
from mim_ray.training.checkpoint import with_prefix

NUM_ITEMS = 40
CATEGORIES = ("mugs", "socks")
TITLES = [f"{('striped', 'plain')[i % 2]} {('red', 'blue', 'green')[i % 3]} thing {i}" for i in range(NUM_ITEMS)]


@dataclass(frozen=True)
class SmallRun:
    """Where it lies, and the scenario that finds it."""

    root: Path
    scenario: Scenario


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """(seed, kind, size) -> an encoded random picture."""

    def make(seed: int, kind: str = "PNG", size: int = 40) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        return stream.getvalue()

    return make


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with key and certificate of cdn.example and localhost, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cdn.example")])
    names = x509.SubjectAlternativeName([x509.DNSName("cdn.example"), x509.DNSName("localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "cdn.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return str(path)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved untrained encoder of the scenario tiny."""
    folder = tmp_path_factory.mktemp("encoder")
    encoder = ItemEncoder.build(load_scenario("tiny").encoders, train_tokenizer(TITLES, 200), seed=0)
    encoder.save(str(folder), stage="csft")
    return folder


@pytest.fixture(scope="session")
def new_run(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> SmallRun:
    """Items i0..i39, users u0..u9 with behaviors, the model sim-mim. Nobody writes into it."""
    return make_run(tmp_path_factory.mktemp("new") / "run", encoder_folder)


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory, new_run: SmallRun) -> SmallRun:
    """The same, for tests that only read, or post items and events of their own."""
    return copy_run(new_run, tmp_path_factory.mktemp("shared") / "run")


@pytest.fixture
def small_run(tmp_path: Path, new_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    """The same, for one test."""
    monkeypatch.setenv("MIM_RAY_CACHE", str(tmp_path / "cache"))
    return copy_run(new_run, tmp_path / "run")


def copy_run(source: SmallRun, root: Path) -> SmallRun:
    shutil.copytree(source.root, root, symlinks=True)
    manifest = (root / "extraction" / "artifact.json").read_text()
    (root / "extraction" / "artifact.json").write_text(manifest.replace(str(source.root), str(root)))
    run = source.scenario.run.model_copy(update={"root": str(root)})
    return SmallRun(root, source.scenario.model_copy(update={"run": run}))


def make_run(root: Path, encoder_folder: Path) -> SmallRun:
    scenario = load_scenario("tiny", [f"run.root={root}", "serving.port=0", "serving.window_s=0.5"])
    (root / "csft").mkdir(parents=True)
    (root / "csft" / "encoder").symlink_to(encoder_folder)
    encoder = ItemEncoder.load(str(encoder_folder))
    assert encoder.encoder_version is not None
    ids = [f"i{row}" for row in range(NUM_ITEMS)]
    no_images = np.zeros((NUM_ITEMS, 3, encoder.image_size, encoder.image_size), np.uint8)
    vectors = encode_batch(encoder, TITLES, no_images, np.zeros(NUM_ITEMS, bool))
    table = EmbeddingTable(f"{root}/center/table").create()
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rows = segment_rows(
        ids, vectors, content_hashes=[content_hash(title, None) for title in TITLES], content_at=[start] * NUM_ITEMS
    )
    table.append(rows, encoder_version=encoder.encoder_version, shard_id="s0")
    snapshot = f"{root}/center/snapshots/{encoder.encoder_version}"
    build_snapshot(table, encoder.encoder_version, snapshot)
    metrics = {"snapshot": snapshot, "encoder_version": encoder.encoder_version}
    manifest = artifacts.Manifest("extraction", "f", artifacts.now(), 1.0, {}, metrics, (), {}, {})
    artifacts.write_manifest(f"{root}/extraction", manifest)
    behaviors = {"user_id": [f"u{row}" for row in range(10)], "behaviors": [ids[row : row + 5] for row in range(10)]}
    (root / "samples" / "behaviors").mkdir(parents=True)
    pq.write_table(pa.table(behaviors), root / "samples" / "behaviors" / "part-0.parquet")
    write_model(f"{root}/ctr/sim-mim", scenario, ids, encoder.encoder_version, snapshot)
    return SmallRun(root, scenario)


def add_impressions(root: Path) -> None:
    """Two of the test split: where `serve_run` finds a user to rank for."""
    impressions = {"user_id": ["u1", "u2"], "behaviors": [["i1", "i2"], ["i3"]]}
    (root / "samples" / "impressions" / "test").mkdir(parents=True)
    pq.write_table(pa.table(impressions), root / "samples" / "impressions" / "test" / "part-0.parquet")


def write_model(uri: str, scenario: Scenario, ids: list[str], encoder_version: str, snapshot: str) -> None:
    """An untrained CTR model: the first 30 items and users u0..u4 are known by id."""
    settings = scenario.ciubm
    counts = np.where(np.arange(NUM_ITEMS) < 30, 5, 0)
    items = ItemIndex.build(pa.array(ids), np.arange(NUM_ITEMS) % 2, CATEGORIES, counts, 1)
    users = Vocabulary(pa.array([f"u{row}" for row in range(5)]))
    items.save(f"{uri}/vocabulary")
    users.save(f"{uri}/vocabulary/users.arrow")
    Features().save(f"{uri}/vocabulary")
    torch.manual_seed(0)
    config = network_config(settings, "sim", scenario.encoders.width)
    num_rows = {"item": items.num_table_rows, "category": items.num_category_rows, "user": len(users) + 1}
    tables = IdTables.create(num_rows, settings.id_dim, seed=0)
    save_model(
        f"{uri}/seed-0", with_prefix("network", CtrNetwork(config).state_dict()) | with_prefix("tables", tables.state())
    )
    info = {
        "variant": "sim-mim",
        "backbone": "sim",
        "content": "mim",
        "encoder_version": encoder_version,
        "snapshot": snapshot,
        "network": config.to_json(),
        "max_behaviors": settings.max_behaviors,
        "id_dim": settings.id_dim,
        "seeds": [0],
        "metrics": {},
    }
    artifacts.write_json(f"{uri}/ctr.json", info)


@pytest.fixture(scope="session")
def both_apis(shared_run: SmallRun) -> Iterator[Callable[[Serving], dict[str, ASGIApp]]]:
    """(settings) -> the apps `ranking` and `items` of the shared run, guarded with these settings."""
    scenario = shared_run.scenario
    service = RankingService.open(Served.of_run(scenario), scenario.serving)
    encoder = NewItemEncoder(
        ItemEncoder.load(f"{shared_run.root}/csft/encoder"), f"{shared_run.root}/center", scenario.data
    )
    similar = SimilarItems(lambda: service.rollout.current, exact_rows=1_000, recall=0.95)
    similar.refresh()
    queries = QueryEncoder(ItemEncoder.load(f"{shared_run.root}/csft/encoder"), scenario.data)

    async def embed(image: bytes | None, title: str | None) -> tuple[np.ndarray, str]:
        return await run_in_threadpool(queries.embed, image, title), encoder.encoder_version

    def build(serving: Serving) -> dict[str, ASGIApp]:
        ranking = ranking_api(service, serving, similar=similar, embed=embed)
        return {"ranking": ranking, "items": new_item_api(encoder, serving)}

    yield build
    service.embeddings.stop()
