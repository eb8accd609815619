"""One worker of benchmarks/ctr_training.py's p2_over_p1: prints the seconds of its steps.

python ctr_training_workers.py BATCH LENGTH VOCABULARY STEPS THREADS WORKERS PORT RANK
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from ctr_training_sides import OurStep, indexed, mm_vectors, raw_batches


def main() -> None:
    size, length, vocabulary, num_steps, threads, workers, port, rank = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    mm = mm_vectors(vocabulary)
    batches = [indexed(raw, mm) for raw in raw_batches(6, size, length, vocabulary, seed=rank)]
    step = OurStep("sim", vocabulary, with_content=True)
    for batch in batches[:2]:
        step(batch)
    dist.barrier()
    start = time.perf_counter()
    for number in range(num_steps):
        step(batches[number % len(batches)])
    print(time.perf_counter() - start)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
