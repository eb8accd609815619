"""The contrastive loss of Eq. 5, exact, in memory that does not grow with the number of negatives.

Dense logits would take (queries × candidates) numbers, 3.7 GB at the paper's size. Here the candidates pass by in tiles:
one forward pass keeps, per query, the log-sum-exp and the softmax-weighted mean candidate

    lse_i = log Σ_j exp(s·q_i·c_j)        mean_i = Σ_j p_ij c_j        p_ij = exp(s·q_i·c_j − lse_i)

(attention with keys = values = candidates), which is all that the gradients of queries and scale need:
∂lse_i/∂q_i = s·mean_i and ∂lse_i/∂s = q_i·mean_i. Fresh candidates need gradients of their own,
∂(Σ_i g_i lse_i)/∂c_j = s·Σ_i g_i p_ij q_i, a second pass over the fresh ones only. Past candidates get none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mim_ray.contrastive.unit import inverse_lengths, pass_normalize_

MAX_LOGIT_SCALE = 100.0
_TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**24}  # of one tile of logits: 2 MB stay in a cache, 64 MB fill a GPU
_SAFE_LOGIT = 60.0  # up to here exp(±logit) and sums of a million of them fit float32 without subtracting a maximum


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    *,
    logit_scale: Tensor,
    past: Tensor | None = None,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """Mean over the queries of Eq. 5: how hard each query's positive is to tell from all other candidates.

    Args:
        queries: (B, D), of any length; cosine is computed inside.
        candidates: (M, D), the fresh ones, with gradients.
        positive_index: (B,) int64, the row of `candidates` that answers each query.
        logit_scale: scalar, 1 / temperature, with its gradient if it is learned.
        past: (K', D) further negatives without gradients, any float type, of length 1 each (they are not normalised).
        mask: what is no negative: bool (B, M + K'), True where a candidate must not count for a query; or int64 (2, n),
            the same as pairs (query, candidate). Columns are `candidates` then `past`. A positive always counts.
        valid: (M + K',) bool, False for candidates that take no part at all.
        bias: (M + K',) finite, without gradient, added to a candidate's logits, the positive's own included: for the
            correction of sampling frequencies (Yi et al., RecSys 2019), minus the log of how often it is drawn.
        tile: candidates handled at once; chosen from B by default.

    Returns:
        Scalar. Departs from the paper: temperature, mask and bias.
    """
    return info_nce_rows(
        queries,
        candidates,
        positive_index,
        logit_scale=logit_scale,
        past=past,
        mask=mask,
        valid=valid,
        bias=bias,
        tile=tile,
    ).mean()


def info_nce_rows(
    queries: Tensor,
    candidates: Tensor,
    positive_index: Tensor,
    *,
    logit_scale: Tensor,
    past: Tensor | None = None,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    tile: int | None = None,
) -> Tensor:
    """`info_nce` before the mean: (B,) losses."""
    queries, candidates, scale = queries.float(), candidates.float(), logit_scale.float()
    if past is None:
        past = candidates.new_empty((0, candidates.shape[1]))
    numbers = _TILE_NUMBERS.get(queries.device.type, _TILE_NUMBERS["cpu"])
    tile = tile or max(256, numbers // max(1, len(queries)))
    hidden = _Hidden.of(mask, valid, positive_index, len(candidates), len(past), tile)
    if bias is not None:
        assert bias.shape == (len(candidates) + len(past),)
        bias = bias.detach().float()
        bias = bias - (bias.max() + bias.min()) / 2  # a constant changes no softmax; so the numbers stay small
    rows: Tensor = _Rows.apply(queries, candidates, scale, past, positive_index, hidden, bias, tile)
    return rows


def same_key_pairs(query_keys: Tensor, candidate_keys: Tensor) -> Tensor:
    """(2, n) int64 pairs (query, candidate) of equal keys, made by sorting: no (B, K) table.

    Args:
        query_keys: (B,) int64. candidate_keys: (K,) int64.
    """
    order = torch.argsort(query_keys)
    ordered = query_keys[order]
    low = torch.searchsorted(ordered, candidate_keys)
    counts = torch.searchsorted(ordered, candidate_keys, right=True) - low
    columns = torch.repeat_interleave(torch.arange(len(candidate_keys), device=query_keys.device), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place_in_run = torch.arange(len(columns), device=query_keys.device) - first
    return torch.stack([order[low.repeat_interleave(counts) + place_in_run], columns])


class _Hidden:
    """Entries of the logits that do not count, cut by tile: pairs sorted by column, and columns as a whole.

    Args:
        rows, columns: (n,) pairs, sorted by column. dead: (m,) columns, sorted. edges: first columns of the tiles, and K.
    """

    def __init__(self, rows: Tensor, columns: Tensor, dead: Tensor, edges: list[int]) -> None:
        self.rows, self.columns, self.dead = rows, columns, dead
        at = torch.tensor(edges, device=columns.device)
        cuts = torch.stack(
            [torch.searchsorted(columns, at), torch.searchsorted(dead, at)]
        ).tolist()  # one wait for a GPU
        self._cuts = {start: (cuts[0][n : n + 2], cuts[1][n : n + 2]) for n, start in enumerate(edges[:-1])}

    @classmethod
    def of(
        cls, mask: Tensor | None, valid: Tensor | None, positive: Tensor, num_fresh: int, num_past: int, tile: int
    ) -> _Hidden | None:
        if mask is None and valid is None:
            return None
        none = positive.new_empty(0)
        rows = columns = dead = none
        if mask is not None:
            rows, columns = mask.nonzero().unbind(1) if mask.dtype == torch.bool else mask.unbind(0)
            keep = columns != positive[rows]
            rows, columns = rows[keep], columns[keep]
            order = torch.argsort(columns)
            rows, columns = rows[order], columns[order]
        if valid is not None:
            assert valid.shape == (num_fresh + num_past,)
            dead = (~valid).nonzero().squeeze(1)
        edges = [*range(0, num_fresh, tile), *range(num_fresh, num_fresh + num_past, tile), num_fresh + num_past]
        return cls(rows, columns.contiguous(), dead, edges)

    def clear(self, logits: Tensor, start: int) -> None:
        """Set the hidden entries of the tile that begins at column `start` to −inf."""
        (low, high), (first, last) = self._cuts[start]
        if high > low:
            logits[self.rows[low:high], self.columns[low:high] - start] = -torch.inf
        if last > first:
            logits[:, self.dead[first:last] - start] = -torch.inf


class _Rows(torch.autograd.Function):
    """(B,) log Σ_j exp(scale · q·c_j + bias_j) over fresh and past candidates, less the positive's own logit.

    Queries and fresh candidates come in any length. Their unit vectors are made per tile: a copy of the fresh ones, its
    gradient and that of the positives' rows would each be as large as the candidates.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        fresh: Tensor,
        scale: Tensor,
        past: Tensor,
        positive: Tensor,
        hidden: _Hidden | None,
        bias: Tensor | None,
        tile: int,
    ) -> Tensor:
        query_inverse, inverse = inverse_lengths(queries), inverse_lengths(fresh)
        scaled = queries * (query_inverse * scale)
        bounded = float(scale if bias is None else scale + bias.abs().max()) <= _SAFE_LOGIT
        num_rows, width = queries.shape
        top = queries.new_zeros((num_rows, 1)) if bounded else queries.new_full((num_rows, 1), -torch.inf)
        total = queries.new_zeros(num_rows)
        mean = queries.new_zeros((num_rows, width))
        buffer = queries.new_empty(num_rows * min(tile, max(len(fresh), len(past))))
        for start, stop in _tiles(len(fresh), len(past), tile):
            block = _block(fresh, inverse, past, start, stop)  # (t, D)
            logits = buffer[: num_rows * len(block)].view(num_rows, len(block))
            _logits(scaled, block, bias, start, out=logits)
            if hidden is not None:
                hidden.clear(logits, start)
            if not bounded:
                higher = torch.maximum(top, logits.amax(1, keepdim=True)).clamp_min(-1e30)
                shrink = torch.exp(top - higher)
                total.mul_(shrink.squeeze(1))
                mean.mul_(shrink)
                logits.sub_(higher)
                top = higher
            logits.exp_()
            total.add_(logits.sum(1))
            mean.addmm_(logits, block)
        total.clamp_min_(torch.finfo(total.dtype).tiny)  # a query whose candidates are all hidden: no weight, no NaN
        mean.div_(total.unsqueeze(1))
        lse = total.log_().add_(top.squeeze(1))
        ctx.save_for_backward(queries, fresh, scale, positive, mean, lse, query_inverse, inverse)
        ctx.hidden, ctx.bias, ctx.tile, ctx.bounded = hidden, bias, tile, bounded
        own = (scaled * fresh[positive] * inverse[positive]).sum(1)
        return lse - (own if bias is None else own + bias[positive])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, fresh, scale, positive, mean, _, query_inverse, inverse = ctx.saved_tensors
        units = queries * query_inverse
        pull = mean - fresh[positive] * inverse[positive]  # (B, D): from the positive to the mean candidate
        grad_scale = (grad * (units * pull).sum(1)).sum() if ctx.needs_input_grad[2] else None
        grad_queries = grad_fresh = None
        if ctx.needs_input_grad[0]:
            grad_queries = pass_normalize_(pull.mul_((grad * scale).unsqueeze(1)), queries, query_inverse)
        del pull
        if ctx.needs_input_grad[1]:
            grad_fresh = _grad_fresh(ctx, units, grad)
        return grad_queries, grad_fresh, grad_scale, None, None, None, None, None


def _grad_fresh(ctx: Any, units: Tensor, grad: Tensor) -> Tensor:
    """(M, D): s·Σ_i g_i (p_ij − [j is i's positive]) q_i, through the normalisation of the candidates."""
    _, fresh, scale, positive, _, lse, _, inverse = ctx.saved_tensors
    grad_fresh = torch.empty_like(fresh, memory_format=torch.contiguous_format)
    num_rows = len(units)
    scaled = units * scale
    # p_ij·g_i·s·q_i; while exp(logits) is in range, exp(−lse_i) joins the narrow side of the product
    factor = grad * torch.exp(-lse) if ctx.bounded else grad
    weighted = scaled * factor.unsqueeze(1)  # (B, D)
    buffer = units.new_empty(num_rows * min(ctx.tile, len(fresh)))
    for start, stop in _tiles(len(fresh), 0, ctx.tile):
        block = fresh[start:stop] * inverse[start:stop]
        logits = buffer[: num_rows * len(block)].view(num_rows, len(block))
        _logits(scaled, block, ctx.bias, start, out=logits)
        if ctx.hidden is not None:
            ctx.hidden.clear(logits, start)
        if not ctx.bounded:
            logits.sub_(lse.unsqueeze(1))
        torch.mm(logits.exp_().T, weighted, out=grad_fresh[start:stop])
    grad_fresh.index_add_(0, positive, scaled.mul_(grad.unsqueeze(1)), alpha=-1.0)
    for start, stop in _tiles(len(fresh), 0, ctx.tile):
        pass_normalize_(grad_fresh[start:stop], fresh[start:stop], inverse[start:stop])
    return grad_fresh


def _logits(scaled: Tensor, block: Tensor, bias: Tensor | None, start: int, *, out: Tensor) -> None:
    """Into `out` (B, t): the logits of the columns from `start` on."""
    if bias is None:
        torch.mm(scaled, block.T, out=out)
    else:
        torch.addmm(bias[start : start + len(block)], scaled, block.T, out=out)


def _tiles(num_fresh: int, num_past: int, tile: int) -> list[tuple[int, int]]:
    """(first column, end) of each tile; no tile has both fresh and past columns."""
    end = num_fresh + num_past
    tiles = [(start, min(start + tile, num_fresh)) for start in range(0, num_fresh, tile)]
    return tiles + [(start, min(start + tile, end)) for start in range(num_fresh, end, tile)]


def _block(fresh: Tensor, inverse: Tensor, past: Tensor, start: int, stop: int) -> Tensor:
    """(t, D) unit vectors of the columns start … stop − 1."""
    if start < len(fresh):
        return fresh[start:stop] * inverse[start:stop]
    return past[start - len(fresh) : stop - len(fresh)].to(fresh.dtype)
