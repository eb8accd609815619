"""Posted events back into training: what POST /v1/events stored, as files of the table `interactions`.

    python jobs/export_events.py --config tiny --to /data/shop      # writes /data/shop/interactions/posted-events-*.parquet
    python jobs/build_samples.py --config tiny data.root=/data/shop

Writes only what is new; may be killed at any moment and run again.
"""

from mim_ray.pipeline.export_events import main

if __name__ == "__main__":
    main(__doc__)
