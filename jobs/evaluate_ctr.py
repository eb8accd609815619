"""Evaluation: AUC, GAUC, log loss, age buckets and categories of the CTR models, with 95 % intervals; writes the
predictions tables. Runs missing earlier stages first.

    python jobs/evaluate_ctr.py --config tiny
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "evaluation")
