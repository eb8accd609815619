"""C-SFT (paper Section 3.3): fine-tune the encoders on purchase pairs with space-time negatives. Runs missing earlier
stages first.

    python jobs/csft.py --config tiny
    ray job submit --working-dir . -- python jobs/csft.py --config tiny csft.num_past_batches=4
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "csft")
