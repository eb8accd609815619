"""What is current: which encoder version, which snapshot, which CTR model (paper Section 3.5). Switches in one step, and back.

python jobs/promote.py --config tiny                                # show
python jobs/promote.py --config tiny promote                        # what this run's extraction filled
python jobs/promote.py --config tiny promote csft-0a1b2c3d4e5f --ctr sim-mim
python jobs/promote.py --config tiny back
"""

from mim_ray.pipeline.promote import main

if __name__ == "__main__":
    main(__doc__)
