"""Refresh (paper Section 3.5, MFM): bring embeddings and snapshot up to the items table, encoding only what changed.

    python jobs/refresh.py --config tiny                    # once
    python jobs/refresh.py --config tiny --every 60s        # every minute, until Ctrl-C
    python jobs/refresh.py --config tiny --full             # once, comparing the whole catalogue with the table

Run the stage that makes the encoder first (jobs/csft.py or jobs/extract.py). It may be killed at any moment and run again;
a second one beside it says so and leaves.
"""

from mim_ray.pipeline.refresh import main

if __name__ == "__main__":
    main(__doc__)
