"""How fast, lean and exact the contrastive loss is, beside plain logits and other packages.

    python benchmarks/contrastive.py --json contrastive.json --quick     under a minute on two cores
    python benchmarks/contrastive.py --json contrastive.json             adds the training runs on the synthetic shop

Each ratio is mim_ray's figure over the other's: the median over pairs of runs made in turn, with quartiles. Memory is the
most that torch had allocated at once during one forward and backward pass, beyond the inputs; gradients are counted.
benchmarks/README.md says what each key means. The packages of the extra `bench` are measured where they are installed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin: workers share the cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOALS = {
    "time_vs_dense": 0.6,
    "loss_memory_vs_dense": 0.05,
    "time_vs_open_clip": 1.0,
    "memory_vs_open_clip": 0.25,
    "peak_loss_memory_mb_901k": 128.0,
    "grad_max_rel_err": 1e-5,
}
"""Each figure's highest welcome value (MB: 2^20 bytes)."""
PEERS = ("pytorch_metric_learning", "sentence_transformers")


@dataclass(frozen=True)
class Plan:
    """Sizes of a run and seconds for the timed parts. The defaults are the goals' sizes."""

    queries: int = 1_024
    width: int = 256
    past_batches: int = 10
    candidates_per_query: int = 22
    paper_workers: int = 40
    paper_queries: int = 1_024
    few_queries: int = 16
    budget_s: float = 30.0
    peers_until_s: float = float("inf")
    threads: int = 2
    quick: bool = False
    work: Path = Path("runs/benchmark_contrastive")
    seeds: int = 3

    @classmethod
    def quickly(cls, threads: int) -> Plan:
        return cls(paper_queries=256, budget_s=6.0, peers_until_s=35.0, threads=threads, quick=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the report goes")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, 256 queries at the paper's size, no training"
    )
    parser.add_argument("--check", action="store_true", help="leave with 1 when a goal is missed")
    parser.add_argument("--threads", type=int, default=2, help="threads in all; gloo workers share them (2)")
    parser.add_argument("--seeds", type=int, default=3, help="of each training run, in full mode (3)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Plan.work,
        metavar="DIR",
        help="training runs; kept and reused, so remove it after a change of code",
    )
    args = parser.parse_args(argv)
    if args.threads < 1 or args.seeds < 2:
        parser.error("--threads must be 1 or more, and --seeds 2 or more: an interval needs them.")
    plan = Plan.quickly(args.threads) if args.quick else Plan(threads=args.threads, work=args.work, seeds=args.seeds)
    report = measure(plan)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    return int(args.check and not all(goal["met"] for goal in report["goals"].values()))


def measure(plan: Plan) -> dict[str, Any]:
    """The whole report: a figure per key, `details` behind each, goals, peers, machine."""
    import torch
    from measuring import machine

    torch.set_num_threads(plan.threads)
    start = time.monotonic()
    details: dict[str, Any] = {}
    parts = _parts(plan, start)
    share = sum(weight for _, weight, _ in parts)
    for number, (name, weight, part) in enumerate(parts, start=1):
        done = sum(weight for _, weight, _ in parts[: number - 1])
        elapsed = time.monotonic() - start
        left = f", about {elapsed / done * (share - done):.0f} s left" if done else ""
        print(f"[{number}/{len(parts)}] {name}{left}", file=sys.stderr, flush=True)
        details |= part()
    report: dict[str, Any] = {"benchmark": "contrastive", "quick": plan.quick, **_figures(details)}
    report["goals"] = {
        key: {"at_most": goal, "met": report[key] is not None and report[key] <= goal} for key, goal in GOALS.items()
    }
    report |= {peer: details.pop(peer) for peer in PEERS}
    if "retrieval" in details:
        report["retrieval"] = details.pop("retrieval")
    return report | {
        "details": details,
        "machine": machine(plan.threads),
        "seconds": round(time.monotonic() - start, 1),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = [
        "",
        f"{facts['cpu']}, {facts['cpus']} cpus (load {facts['load_average'][0]}), {facts['threads']} threads, {facts['system']}",
        f"python {facts['python']}, {versions}",
        f"{facts['command']}   {facts['measured_at']}   commit {facts['git_commit']}",
        "",
        f"{'figure':<26} {'value':>10} {'goal':>10}  {'met':<4} spread and both sides (mim_ray / other)",
    ]
    for key, goal in report["goals"].items():
        value = "none" if report[key] is None else f"{report[key]:.4g}"
        met = "yes" if goal["met"] else "NO"
        lines.append(
            f"{key:<26} {value:>10} {'<= ' + format(goal['at_most'], 'g'):>10}  {met:<4} {_sides(report['details'][key])}"
        )
    lines += ["", "beside them, the same number of negatives:"]
    lines += [f"  {text}" for text in _peer_lines(report)]
    if "retrieval" in report:
        from contrastive_retrieval import retrieval_table

        lines += ["", *retrieval_table(report["retrieval"])]
    return [*lines, "", f"measured in {report['seconds']:.0f} s"]


def _parts(plan: Plan, start: float) -> list[tuple[str, float, Callable[[], dict[str, Any]]]]:
    """(what is told, share of the time, what is done) in order; longest imports last."""
    sizes = {"num_past_batches": plan.past_batches, "width": plan.width}

    def gradients() -> dict[str, Any]:
        from contrastive_cases import gradient_error

        return {"grad_max_rel_err": gradient_error(num_queries=min(128, plan.queries), num_past_batches=3, width=64)}

    def dense() -> dict[str, Any]:
        from contrastive_cases import against_dense

        return against_dense(num_queries=plan.queries, budget_s=plan.budget_s, **sizes)

    def paper() -> dict[str, Any]:
        from contrastive_cases import paper_size_memory

        found = paper_size_memory(num_queries=plan.paper_queries, width=plan.width, workers=plan.paper_workers)
        return {"peak_loss_memory_mb_901k": found}

    def peers() -> dict[str, Any]:
        return _peers(plan, start + plan.peers_until_s)

    def retrieval() -> dict[str, Any]:
        from contrastive_retrieval import measure_retrieval

        return {"retrieval": measure_retrieval(plan.work, num_seeds=plan.seeds, threads=plan.threads)}

    parts = [
        ("gradients against float64", 3.0, gradients),
        ("plain logits and cross-entropy", 10.0, dense),
        ("the paper's 901,119 negatives", 5.0, paper),
        ("open_clip, two gloo workers", 13.0, lambda: _open_clip(plan)),
        ("pytorch-metric-learning and sentence-transformers", 25.0, peers),
    ]
    return parts if plan.quick else [*parts, ("training runs on the synthetic shop", 60.0, retrieval)]


def _open_clip(plan: Plan) -> dict[str, Any]:
    from contrastive_workers import Size, against_open_clip

    size = Size(
        num_workers=2,
        batch_size=plan.queries,
        width=plan.width,
        threads=max(1, plan.threads // 2),
        budget_s=plan.budget_s / 2,
    )
    found = against_open_clip(size)
    return {"two_workers": found.pop("grad"), **found}


def _peers(plan: Plan, until: float) -> dict[str, Any]:
    import contrastive_peers as peers
    from measuring import missing_package

    found: dict[str, Any] = dict.fromkeys(PEERS)
    found["missing"] = {}
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        PEERS[0]: lambda: peers.pytorch_metric_learning(
            num_queries=plan.queries,
            few_queries=plan.few_queries,
            num_past_batches=plan.past_batches,
            width=plan.width,
            budget_s=plan.budget_s / 2,
        ),
        PEERS[1]: lambda: peers.sentence_transformers(
            num_queries=plan.queries,
            candidates_per_query=plan.candidates_per_query,
            width=plan.width,
            budget_s=plan.budget_s / 4,
        ),
    }
    for name, part in measured.items():
        if time.monotonic() > until:
            found["missing"][name] = "The machine is too busy for a minute's run. Leave --quick out."
            continue
        try:
            found[name] = part()
        except ImportError as error:
            found["missing"][name] = missing_package(error, name)
    return found


def _figures(details: dict[str, Any]) -> dict[str, float | None]:
    """The plain numbers; the gradient error is the worst of one process and of the gloo workers."""
    figures: dict[str, float | None] = {key: details[key]["value"] for key in GOALS}
    figures["grad_max_rel_err"] = max(details["grad_max_rel_err"]["value"], details["two_workers"]["value"])
    return figures


def _sides(detail: dict[str, Any]) -> str:
    if "quartiles" in detail:
        low, high = detail["quartiles"]
        return f"[{low:.2f}, {high:.2f}] of {detail['pairs']} pairs; {detail['mim_ray_ms']:.0f} / {detail['other_ms']:.0f} ms"
    if "other_mb" in detail:
        return f"{detail['mim_ray_mb']:.1f} / {detail['other_mb']:.1f} MB"
    if "embeddings_mb" in detail:
        return f"beside {detail['embeddings_mb']:.0f} MB of embeddings; plain logits {detail['dense_logits_mb']:.0f} MB"
    return "one process and two gloo workers, against float64"


def _peer_lines(report: dict[str, Any]) -> list[str]:
    missing = report["details"]["missing"]
    split = report["details"]["time_vs_split_dense"]
    lines = [f"plain logits, past apart (no gradient for it): time {split['value']:.2f}  {_sides(split)}"]
    for peer in PEERS:
        if report[peer] is None:
            lines.append(f"{peer}: not measured. {missing[peer]}")
            continue
        cases = report[peer] if "ntxent" in report[peer] else {"cached loss": report[peer]}
        for name, case in cases.items():
            lines.append(
                f"{peer} {name}, {case['queries']:,} queries, {case['negatives']:,} negatives: "
                f"time {case['time']['value']:.2f}  {_sides(case['time'])}; memory {case['memory']['value']:.3f}  {_sides(case['memory'])}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
