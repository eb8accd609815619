"""Eqs. 2-4: the image tower F_V, the language tower F_L, tensor fusion, and the item encoder made of them. No Ray."""

from mim_ray.encoders.item_encoder import ItemEmbeddings, ItemEncoder, encode_batch, unit

__all__ = ["ItemEmbeddings", "ItemEncoder", "encode_batch", "unit"]
