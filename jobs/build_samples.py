"""Samples: items and raw events -> interest pairs and impressions, point-in-time correct (SPEC section 2).

python jobs/build_samples.py --config movietweetings data.root=/path/to/movietweetings
ray job submit --working-dir . -- python jobs/build_samples.py --config tiny
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "samples")
