"""Upkeep of the embedding log: fold waiting window messages, compact, purge deleted items, vacuum.

    python jobs/maintain.py --config tiny                    # once
    python jobs/maintain.py --config tiny --every 10min      # every ten minutes, until Ctrl-C
    python jobs/maintain.py --config tiny maintenance.deleted_retention_days=7

Runs beside everything else; readers and writers go on. It may be killed at any moment and run again.
"""

from mim_ray.pipeline.maintain import main

if __name__ == "__main__":
    main(__doc__)
