"""What an A/B test of the ranking says: CTR and RPM by arm, differences with 95 % intervals, and whether the split is sound.

python jobs/ab_report.py --config tiny --html runs/ab.html 'serving.arms={control: {variant: din-base}, mim: {variant: din-mim}}'
python jobs/ab_report.py --config tiny --since 2026-03-02 --base control --json runs/ab.json
"""

from mim_ray.pipeline.ab_report import main

if __name__ == "__main__":
    main(__doc__)
