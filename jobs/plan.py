"""Scale on paper: hours, GPU-hours, storage and memory for a catalogue of any size, from measured rates; says which.

python jobs/plan.py --items 1.42e9 --width 128 --dtype float16
python jobs/plan.py --items 1.42e9 --gpu-rate 2000 --gpus 40 --price 0.023 --machine-memory-gb 256
python jobs/plan.py --items 5e7 --rates runs/scale.json runs/extraction.json
"""

from mim_ray.pipeline.plan_cli import main

if __name__ == "__main__":
    main(__doc__)
