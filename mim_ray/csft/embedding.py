"""Eqs. 2-4 for what the chunks hold: tokens, tensors on the encoder's device, embeddings at the three levels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mim_ray.csft.dataset import PairBatch
from mim_ray.csft.items import Items
from mim_ray.csft.objective import LocalBatch, Shown
from mim_ray.encoders import ItemEncoder


def embed_items(encoder: ItemEncoder, items: Items) -> Tensor:
    """(n, 3, D): h^MM, h^txt, h^img; zeros where a modality is missing."""
    device = encoder.image_projection.weight.device
    tokens = {key: value.to(device) for key, value in encoder.text.tokenize(items.titles).items()}
    has_image, has_text = torch.from_numpy(items.has_image).to(device), torch.from_numpy(items.has_text).to(device)
    embedded = encoder(torch.tensor(items.pixels, device=device), has_image, tokens, has_text)
    return torch.stack([embedded.mm, embedded.text, embedded.image], dim=1)


def embed_batch(
    encoder: ItemEncoder, batch: PairBatch, mask_user_items: bool, categories: np.ndarray | None = None
) -> LocalBatch:
    """Eqs. 2-4 for queries and items; their pictures pass F_V together.

    Args:
        categories: (num_items,) codes by catalogue row, where the objective asks for them.
    """
    device = encoder.image_projection.weight.device
    shown_place, shown_items = batch.shown if batch.shown is not None else (np.zeros(0, np.int64), None)
    items = Items.joined([*batch.groups, *([shown_items] if shown_items is not None else [])])
    num_queries, num_items = len(batch), len(items.rows) - len(shown_place)
    has_image = torch.tensor(items.has_image, device=device)
    has_text = torch.tensor(items.has_text, device=device)
    pixels = torch.from_numpy(np.concatenate([batch.query_pixels, items.pixels])).to(device)
    image = encoder.encode_image(pixels)
    queries, image = image[:num_queries], image[num_queries:]
    image = torch.where(has_image.unsqueeze(1), image, torch.zeros_like(image))
    text = encoder.encode_text({key: value.to(device) for key, value in encoder.text.tokenize(items.titles).items()})
    text = torch.where(has_text.unsqueeze(1), text, torch.zeros_like(text))
    embedded = torch.stack([encoder.fuse(image, text), text, image], dim=1)  # (n, 3, D)
    rows, contents = torch.tensor(items.rows, device=device), torch.tensor(items.contents, device=device)

    def parts(places: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return embedded[places], has_text[places], has_image[places], rows[places], contents[places]

    shown = None
    if shown_items is not None:
        shown = Shown(torch.tensor(shown_place, device=device), *parts(slice(num_items, None)))
    codes = None
    if categories is not None:
        codes = torch.tensor(categories[items.rows[:num_items]], dtype=torch.int64, device=device)
    bought = (torch.tensor(batch.bought[0], device=device), torch.tensor(batch.bought[1], device=device))
    return LocalBatch(
        queries, *parts(slice(num_items)), bought if mask_user_items else None, categories=codes, shown=shown
    )
