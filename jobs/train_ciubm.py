"""CTR models (paper Section 3.4): base and base + MIM for each user behavior model in ciubm.variants. Runs missing earlier
stages first.

    python jobs/train_ciubm.py --config tiny
    python jobs/train_ciubm.py --config tiny 'ciubm.variants=[din-base, din-mim]' 'ciubm.seeds=[0, 1, 2]'
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "ctr")
