"""The cases of benchmarks/ctr_training.py."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ctr_training_sides import (
    HIDDEN,
    NUM_CATEGORIES,
    OurStep,
    category_of,
    fuxi_batch,
    fuxi_step,
    indexed,
    mm_vectors,
    our_network,
    raw_batches,
)
from measuring import missing_package, ratio, seconds_in_turn, seconds_of

from mim_ray.ciubm.dataset import COLUMNS, Content, ImpressionEncoder, IndexedBatch, gather_batch
from mim_ray.ciubm.flops import matrix_flops
from mim_ray.ciubm.model import CtrNetwork, EmbeddedBatch
from mim_ray.ciubm.vocabulary import ItemIndex, Vocabulary

if TYPE_CHECKING:
    from ctr_training import Plan

_NUM_BATCHES = 6
_PEERS = ("din", "sim", "twin", "dien")
_DNNS = (HIDDEN, (500, 500, 500), (128, 64))
"""Of all cases here, of FuxiCTR's template, and this project's default."""


def vs_fuxictr_100k(plan: Plan) -> dict[str, Any]:
    return {"vs_fuxictr_100k": _against_fuxictr(plan, plan.small)}


def vs_fuxictr_4m(plan: Plan) -> dict[str, Any]:
    return {"vs_fuxictr_4m": _against_fuxictr(plan, plan.large)}


def _against_fuxictr(plan: Plan, vocabulary: int) -> dict[str, Any]:
    """FuxiCTR's seconds over ours, base models; FuxiCTR with its default user behavior model and with one as wide as ours."""
    raw = raw_batches(_NUM_BATCHES, plan.batch_size, plan.length, vocabulary)
    ours, theirs = [indexed(batch, None) for batch in raw], [fuxi_batch(batch) for batch in raw]
    found = {}
    for name in _PEERS:
        if plan.quick and name == "dien":  # reported in the full mode: its loops take long
            continue
        try:
            peers = [fuxi_step(name, vocabulary)]
            if not (plan.quick and vocabulary == plan.large):  # there all but the tables is small
                peers.append(fuxi_step(name, vocabulary, equal_widths=True))
        except ImportError as error:
            found[name] = {"value": None, "missing": missing_package(error, "fuxictr")}
            continue
        sides = [_in_turn(OurStep(name, vocabulary, with_content=False), ours)]
        sides += [_in_turn(peer, theirs) for peer in peers]
        least = 2 if plan.quick and vocabulary == plan.large else plan.least
        mine, of_own, *of_equal = seconds_in_turn(*sides, budget_s=plan.budget_s, least=least)
        pair = ratio(of_own, mine)
        found[name] = {
            "value": pair["value"],
            "quartiles": pair["quartiles"],
            "pairs": pair["pairs"],
            "equal_widths": ratio(of_equal[0], mine)["value"] if of_equal else None,
            "mim_ray": _examples(plan, mine),
            "fuxictr": _examples(plan, of_own),
        }
    return found


def mim_over_base(plan: Plan) -> dict[str, Any]:
    """+MIM over base: FLOPs of matrix products of the whole network, and time of a step at 100 k items.

    The goals' FLOPs are those of the deep network that all cases have; other widths stand beside them.
    """
    raw = raw_batches(_NUM_BATCHES, plan.batch_size, plan.length, plan.small)
    mm = mm_vectors(plan.small)
    base, mim = [indexed(batch, None) for batch in raw], [indexed(batch, mm) for batch in raw]
    flops, times = {}, {}
    for name in ("sim", "din"):
        steps = [OurStep(name, plan.small, with_content=content) for content in (False, True)]
        embedded = [gather_batch(batch, step.tables) for batch, step in zip((base[0], mim[0]), steps, strict=True)]
        by_dnn = {"-".join(map(str, hidden)): _flops_ratio(name, hidden, embedded, raw[0].label) for hidden in _DNNS}
        flops[name] = {**by_dnn["-".join(map(str, HIDDEN))], "by_dnn": by_dnn}
        of_base, of_mim = seconds_in_turn(
            _in_turn(steps[0], base), _in_turn(steps[1], mim), budget_s=plan.budget_s, least=plan.least
        )
        times[name] = ratio(of_mim, of_base)
    return {
        "mim_over_base_flops": {**flops["sim"], "din": flops["din"]},
        "mim_over_base_time": {"value": times["sim"]["value"], "sim": times["sim"], "din": times["din"]},
    }


def _flops_ratio(
    backbone: str, hidden: tuple[int, ...], batches: list[EmbeddedBatch], label: np.ndarray
) -> dict[str, Any]:
    """Of +MIM over base, for a batch of each."""
    counted = []
    for batch in batches:
        network = CtrNetwork(our_network(backbone, with_content=batch.behavior_mm is not None, hidden=hidden))
        counted.append(matrix_flops(network, batch, torch.from_numpy(label)))
    return {
        "train": round(counted[1].train / counted[0].train, 3),
        "inference": round(counted[1].inference / counted[0].inference, 3),
        "base_mflops": [round(count / 1e6, 3) for count in counted[0]],
    }


def loader_over_step(plan: Plan) -> dict[str, Any]:
    """Time of SIM + MIM training from Parquet with the real loader over that of as many steps on ready batches.

    The step has half of the cores that this process may use; the loader's threads find the other half.
    """
    from mim_ray.data.batches import RowBatches, prefetch
    from mim_ray.representation_center.snapshot import Snapshot, write_snapshot

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, allowed // 2))
    with tempfile.TemporaryDirectory() as folder:
        items, users = _catalogue(plan.small)
        ids = items.vocabulary.ids.to_pylist()
        write_snapshot(f"{folder}/snapshot", ids, mm_vectors(len(ids)), encoder_version="benchmark")
        content = Content(Snapshot.open(f"{folder}/snapshot"), items)
        encoder = ImpressionEncoder(items, users, content, plan.length)
        _write_impressions(Path(folder) / "train.parquet", plan, ids)
        rows = RowBatches(
            f"{folder}/train.parquet", [*COLUMNS, "label"], plan.batch_size, seed=0, prepare=encoder.coded
        )
        step = OurStep("sim", items.num_table_rows, with_content=True)

        def encoded(num_steps: int) -> Iterator[IndexedBatch]:
            for number, rows_of_batch in enumerate(rows.steps(num_steps)):
                yield encoder.encode(rows_of_batch, id_dropout=0.05, generator=np.random.default_rng([0, number]))

        ready = list(itertools.islice(encoded(_NUM_BATCHES), _NUM_BATCHES))

        def on_ready() -> None:
            for number in range(plan.loader_steps):
                step(ready[number % len(ready)])

        def with_loader() -> None:
            for batch in prefetch(encoded(plan.loader_steps)):
                step(batch)

        step(ready[0])
        least = 2 if plan.quick else 3
        loaded, alone = seconds_in_turn(with_loader, on_ready, budget_s=plan.budget_s, least=least, warm_up=False)
        encode_s = seconds_of(lambda: list(itertools.islice(encoded(4), 4))) / 4
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    pair = ratio(loaded, alone)
    examples = plan.loader_steps * plan.batch_size
    return {
        "loader_over_step": {
            **{key: pair[key] for key in ("value", "quartiles", "pairs")},
            "step_threads": threads,
            "examples_per_s_with_loader": round(examples / float(np.median(loaded))),
            "examples_per_s_ready": round(examples / float(np.median(alone))),
            "encode_ms": round(encode_s * 1_000, 1),
        }
    }


def p2_over_p1(plan: Plan) -> dict[str, Any]:
    """Examples/s of SIM + MIM with two gloo workers of half the threads each over one worker with all of them.

    A step is 1,024 examples of each worker; the runs alternate.
    """
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(1 if plan.quick else 3):
        for workers in (1, 2) if number % 2 == 0 else (2, 1):
            rates[workers].append(_rate_of_workers(plan, workers))
    pair = ratio(rates[2], rates[1])
    return {
        "p2_over_p1": {
            **{key: pair[key] for key in ("value", "quartiles", "pairs")},
            "examples_per_s": {f"p{workers}": round(float(np.median(values))) for workers, values in rates.items()},
        }
    }


def examples_per_s(plan: Plan) -> dict[str, Any]:
    """Every model, base and +MIM, by length of history and size of vocabulary: examples/s of steps on ready batches."""
    rows = []
    for length, vocabulary in itertools.product(plan.lengths, (plan.small, plan.large)):
        raw = raw_batches(3, plan.batch_size, length, vocabulary)
        mm = mm_vectors(plan.small)
        for name in ("average", "din", "dien", "bst", "sim", "twin"):
            row: dict[str, Any] = {"model": name, "length": length, "vocabulary": vocabulary}
            for content in (False, True):
                batches = [indexed(batch, mm if content else None) for batch in raw]
                step = _in_turn(OurStep(name, vocabulary, with_content=content), batches)
                (seconds,) = seconds_in_turn(step, budget_s=plan.budget_s / 4, least=3, most=20)
                row["mim" if content else "base"] = _examples(plan, seconds)
            rows.append(row)
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
    return {"examples_per_s": rows}


def _in_turn(step: Callable[[Any], float], batches: list[Any]) -> Callable[[], float]:
    endless = itertools.cycle(batches)
    return lambda: step(next(endless))


def _examples(plan: Plan, seconds: list[float]) -> int:
    return round(plan.batch_size / float(np.median(seconds)))


def _catalogue(num_items: int) -> tuple[ItemIndex, Vocabulary]:
    import pyarrow as pa

    ids = pa.array([f"item-{number:08d}" for number in range(num_items)])
    codes = category_of(np.arange(num_items)) - 1
    names = [f"category {number}" for number in range(NUM_CATEGORIES)]
    items = ItemIndex.build(ids, codes, names, np.ones(num_items, np.int64), 1)
    return items, Vocabulary(pa.array(["someone"]))


def _write_impressions(file: Path, plan: Plan, ids: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mim_ray.data.sample_files import IMPRESSION_GROUP

    raw = raw_batches(plan.loader_steps, plan.batch_size, plan.length, len(ids))
    names = pa.array(ids)
    behaviors = np.concatenate([batch.behaviors.ravel() for batch in raw])
    offsets = np.arange(0, len(behaviors) + 1, plan.length, dtype=np.int32)
    columns = {
        "user_id": pa.array(["someone"] * (len(offsets) - 1)),
        "item_id": names.take(pa.array(np.concatenate([batch.target for batch in raw]))),
        "behaviors": pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(behaviors))),
        "label": pa.array(np.concatenate([batch.label for batch in raw]).astype(np.int8)),
    }
    pq.write_table(pa.table(columns), file, row_group_size=IMPRESSION_GROUP)


def _rate_of_workers(plan: Plan, workers: int) -> float:
    """Examples/s of all workers together, by the slowest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = [plan.batch_size, plan.length, plan.small, plan.steps, max(1, plan.threads // workers), workers, port]
    script = Path(__file__).with_name("ctr_training_workers.py")
    commands = [[sys.executable, str(script), *map(str, sizes), str(rank)] for rank in range(workers)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    answers = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("A worker of p2_over_p1 failed; its error is above.")
    return workers * plan.steps * plan.batch_size / max(float(answer) for answer in answers)
