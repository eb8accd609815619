"""Pre-training (paper Section 3.2): DDA for the image and the text tower, then DMA. Runs missing earlier stages first.

python jobs/pretrain.py --config tiny
ray job submit --working-dir . -- python jobs/pretrain.py --config tiny pretraining.dma_steps=500
"""

from mim_ray.pipeline.cli import job_main

if __name__ == "__main__":
    job_main(__doc__, "pretraining")
