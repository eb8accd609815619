"""Eqs. 2-4: vision and language towers, tensor fusion. Plain PyTorch."""
