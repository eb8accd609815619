"""All stages on one's own data (or, without data.root, on the synthetic shop), then report.html. Finished stages are reused.

    python jobs/run_all.py --config movietweetings data.root=/path/to/folder
    ray job submit --working-dir . -- python jobs/run_all.py --config tiny run.root=/data/runs/tiny

The folder holds items.parquet and interactions.parquet (and, if there are, impressions and interest_pairs).
"""

from mim_ray.pipeline.cli import run_all_main

if __name__ == "__main__":
    run_all_main(__doc__)
