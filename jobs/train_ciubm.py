"""CTR models (paper Section 3.4): base and base + MIM for each user behavior model in ciubm.variants. Runs missing earlier
stages first. A killed job goes on when it is called again. docs/training.md explains the settings.

    python jobs/train_ciubm.py --config tiny
    python jobs/train_ciubm.py --config tiny 'ciubm.variants=[din-base, din-mim]' 'ciubm.seeds=[0, 1, 2]'
    python jobs/train_ciubm.py --config tiny ciubm.num_epochs=5 ciubm.validate_every_steps=200 ciubm.patience=3
    python jobs/train_ciubm.py --config tiny ciubm.vocabulary=hashed ciubm.hash_rows=200000 ciubm.precision=bfloat16

On the next day's data, go on from the models of the day before (only later rows are trained on; tables grow):

    python jobs/train_ciubm.py --config mim run.root=/data/day2 ciubm.continue_from=/data/day1/ctr
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "ctr")
