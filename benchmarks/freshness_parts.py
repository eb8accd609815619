"""The processes of benchmarks/freshness.py: the encoder behind HTTP, the load, and those who look the items up.

    python benchmarks/freshness_parts.py serve FOLDER CENTER ADDRESS STATE
    python benchmarks/freshness_parts.py watch FOLDER ADDRESS STATE (called | read)
    python benchmarks/freshness_parts.py post FOLDER URL RATE SECONDS_PUSHED SECONDS_FOLLOWED

They meet in files of FOLDER, one JSON object a line; times are of the machine's monotonic clock.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from mim_ray.representation_center.machine_release import MachineRelease

NUM_ITEMS = 4_000
CHANGED_EVERY = 5
GIVE_UP_S = 20.0
LOOK_EVERY_S = 0.005


def make_center(work: Path) -> tuple[str, MachineRelease]:
    """An untrained encoder of the scenario tiny, a table of 4,000 items with random vectors, its snapshot."""
    from mim_ray.config import load_scenario
    from mim_ray.encoders.item_encoder import ItemEncoder
    from mim_ray.encoders.tokenizer import train_tokenizer
    from mim_ray.representation_center.build import build_snapshot
    from mim_ray.representation_center.machine_release import MachineRelease, TableSource
    from mim_ray.representation_center.table import EmbeddingTable
    from mim_ray.representation_center.updates import segment_rows

    scenario = load_scenario("tiny")
    encoder = ItemEncoder.build(scenario.encoders, train_tokenizer([_title(row) for row in range(500)], 200), seed=0)
    encoder.save(f"{work}/encoder", stage="csft")
    version = ItemEncoder.load(f"{work}/encoder").encoder_version
    assert version is not None
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, scenario.encoders.width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = segment_rows(
        [f"old-{row}" for row in range(NUM_ITEMS)],
        vectors,
        content_hashes=[f"{row:032x}" for row in range(NUM_ITEMS)],
        content_at=[datetime(2025, 1, 1, tzinfo=UTC)] * NUM_ITEMS,
    )
    center = f"{work}/center"
    table = EmbeddingTable(f"{center}/table").create()
    table.append(rows, encoder_version=version, shard_id="s0")
    snapshot = build_snapshot(table, version, f"{center}/snapshots/{version}", dtype="float16")
    source = TableSource(snapshot.uri, table.uri, f"{center}/window")
    return center, MachineRelease("benchmark", {"mm": source})


def serve(center: str, address: str, state: str) -> None:
    """The new-item encoder as one uvicorn process. It pushes the items that are to be pushed."""
    import torch
    import uvicorn

    from mim_ray.config import load_scenario
    from mim_ray.encoders.item_encoder import ItemEncoder
    from mim_ray.serving.new_item_app import new_item_api
    from mim_ray.serving.new_item_encoder import NewItemEncoder
    from mim_ray.serving.window_folding import WindowFolding

    torch.set_num_threads(1)
    scenario = load_scenario("tiny")
    client = _client(address, state, direct=False)

    def push(encoder_version: str, segment_id: str, rows: pa.Table) -> None:
        if how_of(rows["item_id"][0].as_py()) == "pushed":
            client.push(encoder_version, segment_id, rows)

    encoder = ItemEncoder.load(f"{Path(center).parent}/encoder")
    service = NewItemEncoder(encoder, center, scenario.data, push=push)
    folding = WindowFolding(center, 10.0)
    assert folding is not None
    server = uvicorn.Server(uvicorn.Config(new_item_api(service, scenario.serving), port=0, log_level="error"))
    threading.Thread(target=_announce, args=(server,), daemon=True).start()
    server.run()


def watch(folder: Path, address: str, state: str, path: str) -> None:
    """Look up what was posted until it is answered with its new vector; note when, and the shard."""
    from mim_ray.data.ids import hash_ids
    from mim_ray.representation_center.key_index import shard_of

    client = _client(address, state, direct=path == "read")
    old = client.multi_get([f"old-{row}" for row in range(NUM_ITEMS)]).matrix
    print("ready", flush=True)
    pending: dict[str, float] = {}
    last_post = time.monotonic() + 60
    posts = _Tail(folder / "posts")
    with (folder / f"seen-{path}").open("w") as seen:
        while time.monotonic() < last_post + GIVE_UP_S and not (posts.ended and not pending):
            pending |= {line["item"]: line["at"] for line in posts.new()}
            if pending:
                last_post = max(pending.values())
                names = list(pending)
                answer = client.multi_get(names)
                now = time.monotonic()
                shards = shard_of(hash_ids(names), client.settings.shards)
                for row, name in enumerate(names):
                    kind, _, number = name.rpartition("-")
                    if answer.found[row] and (kind != "old" or (answer.matrix[row] != old[int(number)]).any()):
                        del pending[name]
                        seen.write(json.dumps({"item": name, "at": now, "shard": int(shards[row])}) + "\n")
            time.sleep(LOOK_EVERY_S)


def post(folder: Path, url: str, rate: float, pushed_s: float, followed_s: float) -> None:
    """Post items at fixed times, whatever becomes of those before."""
    import requests

    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=64))
    bodies = [_body(number, "pushed") for number in range(int(rate * pushed_s))]
    bodies += [_body(number, "followed") for number in range(int(rate * followed_s))]
    lock = threading.Lock()
    with (folder / "posts").open("w") as posts, (folder / "acks").open("w") as acks, ThreadPoolExecutor(64) as pool:

        def send(body: dict[str, Any]) -> None:
            try:
                status = session.post(f"{url}/v1/items", json=body, timeout=30).status_code
            except requests.RequestException:
                status = 0
            with lock:
                acks.write(json.dumps({"item": body["item_id"], "at": time.monotonic(), "status": status}) + "\n")

        start = time.monotonic()
        for number, body in enumerate(bodies):
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            name = body["item_id"]
            posts.write(json.dumps({"item": name, "at": start + number / rate, "how": how_of(name)}) + "\n")
            posts.flush()
            pool.submit(send, body)
    with (folder / "posts").open("a") as posts:
        posts.write("\n")


class _Tail:
    """Lines of a file that another process writes; an empty one is the end."""

    def __init__(self, path: Path) -> None:
        self._path, self._place, self.ended = path, 0, False

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._place)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._place += len(whole)
        lines = whole.decode().splitlines()
        self.ended |= "" in lines
        return [json.loads(line) for line in lines if line]


def _client(address: str, state: str, direct: bool) -> Any:
    import ray

    from mim_ray.config.scenario import ParameterMachines as Settings
    from mim_ray.representation_center.parameter_client import ParameterClient

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    shape = json.loads(Path(state).read_text())
    settings = Settings(shards=shape["shards"], replicas=shape["replicas"], deadline_ms=10_000)
    return ParameterClient(state, settings, direct=direct)


def _announce(server: Any) -> None:
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)


def how_of(name: str) -> str:
    """How an item comes to the machines, by its name: pushed, or followed in the window."""
    kind, _, number = name.rpartition("-")
    return kind if kind != "old" else "pushed" if int(number) < NUM_ITEMS // 2 else "followed"


def _body(number: int, how: str) -> dict[str, Any]:
    from PIL import Image

    pixels = np.random.default_rng([number, how == "pushed"]).integers(0, 256, (64, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    name = f"{how}-{number}"
    if number % CHANGED_EVERY == 0:
        name = f"old-{number // CHANGED_EVERY % (NUM_ITEMS // 2) + (0 if how == 'pushed' else NUM_ITEMS // 2)}"
    return {"item_id": name, "title": _title(number), "image": base64.b64encode(stream.getvalue()).decode()}


def _title(number: int) -> str:
    return f"{('striped', 'plain', 'dotted')[number % 3]} {('red', 'blue', 'green')[number % 7 % 3]} thing {number}"


if __name__ == "__main__":
    part, place, *rest = sys.argv[1:]
    if part == "serve":
        serve(*rest)
    elif part == "watch":
        watch(Path(place), *rest)
    else:
        post(Path(place), rest[0], *(float(value) for value in rest[1:]))
