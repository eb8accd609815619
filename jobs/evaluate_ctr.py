"""Evaluation: AUC, GAUC, log loss, calibration, age buckets, categories and exposure of the CTR models, with 95 %
intervals; writes the predictions tables. Runs missing earlier stages first.

    python jobs/evaluate_ctr.py --config tiny
    python jobs/evaluate_ctr.py --config tiny --predictions mine=/data/mine.parquet    # beside the run's models
"""

from mim_ray.pipeline.evaluate import main

if __name__ == "__main__":
    main(__doc__)
