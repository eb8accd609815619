"""Section 3.2: downstream data adaptation (DDA) and modal alignment (DMA)."""
