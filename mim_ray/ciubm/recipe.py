"""The scenario's settings as an architecture: plain PyTorch, no Ray, so that benchmarks and notebooks build the same networks."""

from __future__ import annotations

from mim_ray.ciubm.model import NetworkConfig
from mim_ray.config.scenario import Ciubm


def network_config(settings: Ciubm, backbone: str, content_width: int | None) -> NetworkConfig:
    """Architecture for the scenario's settings; `content_width` None is the base model."""
    projection = settings.content_projection
    return NetworkConfig(
        backbone=backbone,
        id_width=2 * settings.id_dim,
        user_width=settings.id_dim if settings.use_user_id else 0,
        content_width=content_width,
        id_module=settings.id_module,
        content_module=settings.content_module,
        fusion_module=settings.fusion_module,
        num_histogram_bins=21 if settings.similarity_histogram else 0,
        target_content=settings.target_content,
        similarity_summary=settings.similarity_summary,
        content_norm=settings.content_norm,
        content_attention=settings.content_attention,
        missing_content=settings.missing_content,
        query_interest=settings.query_interest,
        content_projection=projection if (content_width or 0) > 2 * projection else 0,
        hidden=settings.hidden,
        dropout=settings.dropout,
        num_searched=settings.num_searched,
        num_short=settings.num_short,
        sim_search=settings.sim_search,
        sim_short=settings.sim_short,
        auxiliary_weight=settings.auxiliary_weight,
    )
