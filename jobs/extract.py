"""Extraction (paper Section 3.5, MFM): all items through the encoder actors into the Delta log, then a snapshot. Runs
missing earlier stages first.

    python jobs/extract.py --config tiny
    python jobs/extract.py --config tiny extraction.encoder=untrained run.root=/data/untrained
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "extraction")
