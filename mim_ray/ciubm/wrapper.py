"""CiUBM (paper Section 3.4, Eqs. 7-9): content interest around any user behavior model.

    ciubm = CiUBM(MyModel(), id_width=32, content_width=128)
    h_B = ciubm(batch)  # (B, ciubm.width)

`MyModel` is any nn.Module with the face of mim_ray.ciubm.backbones.face. Without `content_width` no content reaches the
answer: that is the base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim_ray.ciubm.backbones import Side, WithAttention, WithAuxiliaryLoss
from mim_ray.ciubm.batch import EmbeddedBatch
from mim_ray.ciubm.interest import (
    Norm,
    content_interest,
    content_relevance,
    fusion_interest,
    relevance_and_comparable,
    similarity_histogram,
    similarity_summary,
)


@dataclass(frozen=True)
class ContentOptions:
    """What may differ from the strict form of Eqs. 7-9, all off. They need `content_width`.

    Attributes:
        norm: of the sums of Eqs. 7 and 8.
        num_histogram_bins: of similarity_histogram (SimTier); 0 for none.
        summary: similarity_summary.
        target_content: the target's own MM vector.
        missing_content: items without content are told from unlike ones: a norm counts the comparable behaviors only, and
            two inputs say whether the target has content and which share of the behaviors has. (A learnt vector in the
            place of a missing one adds nothing to them: the next layer's weights of the first input are that vector.)
        query_interest: for search: the behaviors' content weighed by its cosine to the query (Eq. 7 with the query in the
            target's place), the query's cosine to the target, and its similarity_summary with the behaviors.
        projected_width: width p of a learnt linear map without bias of the MM vectors in h_B (Eq. 7's, the target's own, the
            query's interest), one for each; 0 for none. The next layer then costs p instead of D inputs.
    """

    norm: Norm = "sum"
    num_histogram_bins: int = 0
    summary: bool = False
    target_content: bool = False
    missing_content: bool = False
    query_interest: bool = False
    projected_width: int = 0


class CiUBM(nn.Module):
    """h_B = Concat(h_B^ID, h_B^MM, h_B^Fusion) (Eq. 9), then what the options add.

    Args:
        backbone: the user behavior model; its `width` says how wide its interest is.
        id_width: d. content_width: D of the MM embeddings, None for no content at all.
        id_module, content_module, fusion_module: the three parts (Table 5).
        content_attention: hand the cosines of Eq. 7 to the backbone in Side.content (a backbone that uses them: SA-TA).

    Attributes:
        width: of h_B.
    """

    def __init__(
        self,
        backbone: nn.Module,
        id_width: int,
        content_width: int | None,
        *,
        id_module: bool = True,
        content_module: bool = True,
        fusion_module: bool = True,
        content_attention: bool = False,
        options: ContentOptions | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone if id_module else None
        self.has_content, self.content_attention = content_width is not None, content_attention
        self.content_module, self.fusion_module = content_module, fusion_module
        self.options = options or ContentOptions()
        self.width = int(backbone.width) if id_module else 0  # type: ignore[arg-type]
        if content_width is not None:
            chosen = self.options
            num_vectors = content_module + chosen.target_content + chosen.query_interest
            self.width += (chosen.projected_width or content_width) * num_vectors
            self.width += id_width * fusion_module + chosen.num_histogram_bins + 3 * chosen.summary
            self.width += 2 * chosen.missing_content + 4 * chosen.query_interest
            if chosen.projected_width:
                layers = [nn.Linear(content_width, chosen.projected_width, bias=False) for _ in range(num_vectors)]
                self.projections = nn.ModuleList(layers)

    def forward(self, batch: EmbeddedBatch) -> Tensor:
        """h_B (B, width)."""
        return torch.cat(self.parts(batch), dim=-1)

    def parts(self, batch: EmbeddedBatch) -> list[Tensor]:
        """h_B before it is concatenated, in the order of Eq. 9 and of ContentOptions."""
        return self._parts(batch, None)[0]

    def parts_and_loss(self, batch: EmbeddedBatch, label: Tensor) -> tuple[list[Tensor], Tensor]:
        """`parts`, and the backbone's auxiliary loss, a scalar; 0 for a backbone without one."""
        return self._parts(batch, label)

    def _parts(self, batch: EmbeddedBatch, label: Tensor | None) -> tuple[list[Tensor], Tensor]:
        content: list[Tensor] = []
        relevance = None
        if self.has_content:
            relevance, content = self._content(batch)
        loss = batch.target.new_zeros(())
        if self.backbone is None:
            return content, loss
        inputs = self._inputs(batch, relevance)
        if label is not None and isinstance(self.backbone, WithAuxiliaryLoss):
            interest, loss = self.backbone.interest_and_loss(*inputs, label)
        else:
            interest = self.backbone(*inputs)
        return [interest, *content], loss

    def relevance(self, batch: EmbeddedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Which behaviors drive the interest: a_t,i of Eq. 1, the mean over heads, and a_t,i^MM of Eq. 7, each (B, L).

        None for a backbone that weighs no single behavior, and without content.
        """
        of_content = None
        if self.has_content:
            assert batch.target_mm is not None
            assert batch.behavior_mm is not None
            of_content = content_relevance(batch.target_mm, batch.behavior_mm, batch.behavior_mask)
        if not isinstance(self.backbone, WithAttention):
            return None, of_content
        return self.backbone.explain(*self._inputs(batch, of_content)).mean(dim=1), of_content

    def _inputs(self, batch: EmbeddedBatch, relevance: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Side]:
        """What the backbone is given."""
        of_content = relevance if self.content_attention else None
        side = Side(batch.same_category, batch.behavior_age_s, batch.behavior_cross, of_content)
        if len(batch.behaviors) < len(batch.target) and not getattr(self.backbone, "shares_behaviors", False):
            return _repeated(batch.target, batch.behaviors, batch.behavior_mask, side)
        return batch.target, batch.behaviors, batch.behavior_mask, side

    def _content(self, batch: EmbeddedBatch) -> tuple[Tensor, list[Tensor]]:
        """The cosines of Eq. 7, and what follows h_B^ID in h_B."""
        chosen, mask, target, behaviors = self.options, batch.behavior_mask, batch.target_mm, batch.behavior_mm
        if target is None or behaviors is None:
            raise ValueError("This network uses content: the batch needs target_mm and behavior_mm.")
        relevance, comparable = relevance_and_comparable(target, behaviors, mask)
        counted = comparable if chosen.missing_content else mask
        parts: list[Tensor] = []
        if self.content_module:
            if len(behaviors) == 1:  # of a ranking request: fewer than the targets, so projected before they are summed
                parts.append(content_interest(relevance, self._projected(0, behaviors), counted, chosen.norm))
            else:
                parts.append(self._projected(0, content_interest(relevance, behaviors, counted, chosen.norm)))
        if self.fusion_module:
            parts.append(fusion_interest(relevance, batch.behaviors, counted, chosen.norm))
        if chosen.num_histogram_bins > 0:
            parts.append(similarity_histogram(relevance, comparable, chosen.num_histogram_bins))
        if chosen.summary:
            parts.append(similarity_summary(relevance, comparable))
        if chosen.target_content:
            parts.append(self._projected(int(self.content_module), target))
        if chosen.missing_content:
            parts += _presence(target, behaviors, mask)
        if chosen.query_interest:
            parts += self._query_interest(batch.query_mm, target, behaviors, mask)
        return relevance, parts

    def _query_interest(self, query: Tensor | None, target: Tensor, behaviors: Tensor, mask: Tensor) -> list[Tensor]:
        if query is None:
            raise ValueError("This network uses the query's content: the batch needs query_mm.")
        relevance, comparable = relevance_and_comparable(query, behaviors, mask)
        of_each = query.expand(len(target), -1)
        to_target = relevance_and_comparable(of_each, target.unsqueeze(1), torch.ones_like(mask[:, :1]))[0]  # (B, 1)
        counted = comparable if self.options.missing_content else mask
        interest = content_interest(relevance, behaviors, counted, self.options.norm)
        return [self._projected(-1, interest), to_target, similarity_summary(relevance, comparable)]

    def _projected(self, number: int, vectors: Tensor) -> Tensor:
        """(B, D) -> (B, p), or as it is without projections."""
        return self.projections[number](vectors) if self.options.projected_width else vectors


def _repeated(target: Tensor, behaviors: Tensor, mask: Tensor, side: Side) -> tuple[Tensor, Tensor, Tensor, Side]:
    """The behaviors that all targets share as views, one for each."""
    size = len(target)
    of_each = [None if values is None else values.expand(size, *values.shape[1:]) for values in side]
    return target, behaviors.expand(size, -1, -1), mask.expand(size, -1), Side(*of_each)  # type: ignore[arg-type]


def _presence(target: Tensor, behaviors: Tensor, mask: Tensor) -> list[Tensor]:
    """1 where the target has content (B, 1), and the share of real behaviors that has (B, 1), 0 without behaviors."""
    of_target = (target != 0).any(dim=-1, keepdim=True)
    of_behaviors = (torch.linalg.vector_norm(behaviors, dim=-1) > 0) & mask
    share = of_behaviors.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    return [of_target.to(target.dtype), share.to(target.dtype)]
