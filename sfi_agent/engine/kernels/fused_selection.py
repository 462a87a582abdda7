"""The choice of a selector that declares a `Ranking`, by kernels, for a batch in captured steps.

    scratch = make_scratch(ranking, layers, batch, kv_heads, capacity, device)
    kept = kept_range(ranking, prompt_ends, tokens, budget, sink, recent)      once per refresh
    rank_layer(ranking, logits, lse, tokens, scratch.layer(l), sink, recent)   after each layer
    positions, counts = select_ranked(ranking, scratch, tokens, budget, kv_heads, sink, recent)

Masses come from the log-sum-exps of the attention pass; selectors normalise over the candidates and
multiply by what the rest leaves. That is the same number but for rounding, and for rows that spend
all but 2^-24 of their mass on sink and recent tokens, whose share selectors round up to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfi_agent.engine.kernels.scratch import SelectionScratch
from sfi_agent.engine.kernels.selection import rank, select
from sfi_agent.protocols import Ranking

__all__ = ["kept_range", "make_scratch", "rank_layer", "select_ranked"]


def make_scratch(
    ranking: Ranking,
    layers: int,
    batch: int,
    kv_heads: int,
    capacity: int,
    device: torch.device,
) -> SelectionScratch:
    """Scratch of the shape that a ranking needs; see there for what it takes."""
    sets = 1 if ranking.shared_by_heads else kv_heads
    return SelectionScratch((layers, batch, sets), capacity, device)


def kept_range(
    ranking: Ranking,
    prompt_ends: Tensor,
    tokens: Tensor,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
) -> tuple[Tensor, Tensor] | None:
    """Which positions of each sequence are kept as the end of its prompt.

    Args:
        ranking: Of the selector.
        prompt_ends: `[batch]` int64 on the device, see `Evidence.prompt_end`; 0 where there is
            none.
        tokens: `[batch]` int64 on the device, the length each history has now.
        budget: Places per KV head; a history with fewer candidates has as many places.
        sink_tokens: Positions below are not candidates.
        recent_tokens: The newest tokens are not candidates.

    Returns:
        First positions and those behind the last, `[batch]` int64 each, some of which may be no
        candidates; None for a ranking that keeps nothing.
    """
    if not ranking.prompt_tail_tokens:
        return None
    candidates = (tokens - recent_tokens - tokens.clamp(max=sink_tokens)).clamp(min=0)
    places = candidates.clamp(max=budget)
    kept = (places // 2).clamp(max=ranking.prompt_tail_tokens)
    return prompt_ends - kept, prompt_ends


def rank_layer(
    ranking: Ranking,
    logits: Tensor,
    lse: Tensor,
    tokens: Tensor,
    scratch: SelectionScratch,
    sink_tokens: int,
    recent_tokens: int,
    *,
    kept: tuple[Tensor, Tensor] | None = None,
    active: Tensor | None = None,
) -> None:
    """Rank the candidates of one layer by what its attention wrote.

    Args:
        ranking: Of the selector.
        logits: `[batch, kv_heads, rows, capacity]`, see `EvidenceBuffers`; contiguous.
        lse: `[batch, query_heads, queries]` float32, as `attend` returns it; evidence is of the
            newest queries.
        tokens: `[batch]` int64 on the device, the length each history has now, the step's own
            tokens included.
        scratch: Of this layer, `make_scratch(...).layer(index)`.
        sink_tokens: Positions below are not candidates.
        recent_tokens: The newest tokens are not candidates.
        kept: From `kept_range`.
        active: `[batch]`, see `rank`.
    """
    batch, kv_heads, rows, capacity = logits.shape
    group = lse.shape[1] // kv_heads
    asked = lse.unflatten(1, (kv_heads, group))[..., lse.shape[-1] - rows // group :]
    by_row = asked.transpose(-1, -2).reshape(batch, kv_heads, rows)
    if ranking.shared_by_heads:
        logits = logits.view(batch, 1, kv_heads * rows, capacity)
        by_row = by_row.reshape(batch, 1, kv_heads * rows)
    first, stop = kept or (None, None)
    rank(
        logits,
        by_row,
        tokens,
        scratch,
        sink_tokens,
        recent_tokens,
        kept_first=first,
        kept_stop=stop,
        active=active,
    )


def select_ranked(
    ranking: Ranking,
    scratch: SelectionScratch,
    tokens: Tensor,
    budget: int,
    kv_heads: int,
    sink_tokens: int,
    recent_tokens: int,
    *,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the selector chooses in every layer and sequence, ready for `gather`.

    Args:
        ranking: Of the selector.
        scratch: Every active layer ranked; used up.
        tokens: As given to `rank_layer`.
        budget: Places per KV head.
        kv_heads: Of a layer.
        sink_tokens: As given to `rank_layer`.
        recent_tokens: As given to `rank_layer`.
        active: `[layers, batch]`, see `select`; counts are 0 where it is 0.

    Returns:
        Positions `[layers, batch, kv_heads, budget]` and counts `[layers, batch, kv_heads]`, both
        int64 and contiguous.
    """
    positions, counts = select(scratch, tokens, budget, sink_tokens, recent_tokens, active=active)
    if not ranking.shared_by_heads:
        return positions, counts
    return (
        positions.expand(-1, -1, kv_heads, -1).contiguous(),
        counts.expand(-1, -1, kv_heads).contiguous(),
    )
