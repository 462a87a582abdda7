"""The kernels' arithmetic in plain float32, one sequence after another.

It is what the kernels are tested against, and what runs where they cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.kernels.tables import ExtentPlace

__all__ = [
    "ReferenceCall",
    "candidate_range",
    "reference_attend",
    "reference_flush",
    "reference_gather",
    "reference_rank",
    "reference_select",
]


@dataclass(frozen=True, slots=True)
class ReferenceCall:
    """The options of `attention.attend` that are numbers."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 0
    evidence_queries: int = 0
    append: bool = True
    own_tokens: bool = True


def reference_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    places: Sequence[Sequence[ExtentPlace]],
    starts: Tensor,
    ends: Tensor,
    call: ReferenceCall,
    evidence: Tensor | None = None,
    rest_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `attention.attend`; reads `ends` on the host."""
    batch, queries, query_heads, _ = query.shape
    out = query.new_empty(batch, queries, query_heads, new_values.shape[-1])
    lse = query.new_empty(batch, query_heads, queries, dtype=torch.float32)
    for sequence, end in enumerate(ends.tolist()):
        own = (new_keys[sequence].transpose(0, 1), new_values[sequence].transpose(0, 1))
        # A row that is not used has no tokens, whatever its length.
        end = end if places[sequence] else 0
        seen = queries if call.own_tokens else 0
        keys, values = _tokens(places[sequence], end, (own[0][:, :seen], own[1][:, :seen]))
        if call.append and places[sequence]:
            _append(places[sequence], end, *own)
        logits = _logits(query[sequence], keys, call)
        visible = _visible(queries, keys.shape[1], end, starts[sequence], call)
        logits = logits.masked_fill(~visible, float("-inf"))
        total = logits.logsumexp(-1)
        finite = torch.where(total == float("-inf"), 0.0, total)
        weights = (logits - finite[..., None]).exp()
        mixed = torch.einsum("hgqt,htd->qhgd", weights, values.float())
        out[sequence] = mixed.reshape(out.shape[1:]).to(out.dtype)
        lse[sequence] = total.flatten(0, 1)
        if call.evidence_queries:
            assert evidence is not None and rest_mass is not None
            _note_evidence(logits, weights, call, evidence[sequence], rest_mass[sequence])
    return out, lse


def _tokens(
    places: Sequence[ExtentPlace], end: int, own: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of positions 0 to `end`, and the step's own, `[kv_heads, tokens, dim]`."""
    keys, values = [], []
    for index, place in enumerate(places):
        last = index + 1 == len(places)
        stop = end if last else min(end, places[index + 1].first_position)
        length = max(0, stop - place.first_position)
        keys.append(place.keys[:, :length])
        values.append(place.values[:, :length])
    if own is not None:
        keys.append(own[0])
        values.append(own[1])
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def _append(places: Sequence[ExtentPlace], end: int, keys: Tensor, values: Tensor) -> None:
    target = [place for place in places if place.first_position <= end][-1]
    place = slice(end - target.first_position, end - target.first_position + keys.shape[1])
    target.keys[:, place] = keys
    target.values[:, place] = values


def _logits(query: Tensor, keys: Tensor, call: ReferenceCall) -> Tensor:
    """`[kv_heads, group, queries, tokens]` float32."""
    queries, query_heads, dim = query.shape
    grouped = query.reshape(queries, keys.shape[0], -1, dim).float()
    logits = torch.einsum("qhgd,htd->hgqt", grouped, keys.float()) * call.scale
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    return logits


def _visible(queries: int, tokens: int, end: int, starts: Tensor, call: ReferenceCall) -> Tensor:
    """`[kv_heads, 1, queries, tokens]` bool."""
    position = torch.arange(tokens, device=starts.device)
    visible = position >= starts[:, None, None, None]
    if call.own_tokens:
        row = end + torch.arange(queries, device=starts.device)[:, None]
        visible = visible & (position <= row)
        if call.window:
            visible = visible & (position > row - call.window)
    return visible


def _note_evidence(
    logits: Tensor, weights: Tensor, call: ReferenceCall, evidence: Tensor, rest_mass: Tensor
) -> None:
    tokens = logits.shape[-1]
    first, last = candidate_range(tokens, call.sink_tokens, call.recent_tokens)
    asked = logits[:, :, -call.evidence_queries :].transpose(1, 2).flatten(1, 2)
    # Fast rows of a batch may have more slots than evidence has places; nobody reads theirs.
    place = slice(first, min(last, evidence.shape[-1]))
    evidence[..., place] = asked[..., place]
    share = weights[:, :, -call.evidence_queries :].transpose(1, 2).flatten(1, 2)
    rest_mass.copy_(share[..., :first].sum(-1) + share[..., last:].sum(-1))


def candidate_range(tokens: int, sink_tokens: int, recent_tokens: int) -> tuple[int, int]:
    """First candidate position and the one behind the last, of a history of `tokens`."""
    first = min(sink_tokens, tokens)
    return first, max(first, tokens - recent_tokens)


def reference_rank(logits: Tensor, lse: Tensor, kept: Sequence[int] = (0, 0)) -> Tensor:
    """Ranking keys of candidates, higher is better.

    Args:
        logits: `[..., rows, candidates]` float32.
        lse: `[..., rows]` float32, log-sum-exps over everything a row saw.
        kept: First candidate that ranks above all others, and the one behind the last; may lie
            outside the candidates.

    Returns:
        `[..., candidates]` int32, ordered like the log of the attention mass summed over rows.
    """
    share = logits.float() - lse[..., None]
    peak = share.amax(dim=-2, keepdim=True)
    peak = torch.where(peak > -torch.inf, peak, 0.0)
    # Row after row: a library's sum may add some columns in another order than others, and then
    # candidates with the same evidence would not tie.
    weights = (share - peak).exp_().unbind(dim=-2)
    mass = sum(weights[1:], start=weights[0]).log() + peak.squeeze(-2)
    mass = torch.where(mass == 0.0, 0.0, mass)
    mass[..., max(0, kept[0]) : max(0, kept[1])] = float("inf")
    bits = mass.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def reference_select(keys: Tensor, first: int, last: int, budget: int) -> tuple[Tensor, Tensor]:
    """The `budget` best positions of `[first, last)` for each row of keys.

    Args:
        keys: `[rows, capacity]` int32 or int64, higher is better, ties go to the lower position.

    Returns:
        Positions `[rows, budget]` int64, ascending, -1 behind the counts; counts `[rows]` int64.
    """
    count = min(budget, last - first)
    order = keys[:, first:last].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    positions = keys.new_full((keys.shape[0], budget), -1, dtype=torch.int64)
    positions[:, :count] = order.sort(dim=-1).values + first
    return positions, torch.full_like(positions[:, 0], count) if budget else positions.sum(-1)


def reference_gather(
    places: Sequence[ExtentPlace],
    memory: ExtentPlace,
    positions: Tensor,
    counts: Tensor,
    tokens: int,
    capacity: int,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """See `gather.gather`, for one layer of one sequence: positions `[kv_heads, budget]`."""
    keys, values = _tokens(places, tokens, None)
    first, last = candidate_range(tokens, sink_tokens, recent_tokens)
    device = positions.device
    common = torch.cat([torch.arange(first), torch.arange(last, tokens)]).to(device)
    for head, count in enumerate(counts.tolist()):
        source = torch.cat([positions[head, :count], common])
        target = slice(capacity - count, capacity + len(common))
        memory.keys[head, target] = keys[head, source]
        memory.values[head, target] = values[head, source]


def reference_flush(
    memory: ExtentPlace,
    places: Sequence[ExtentPlace],
    segment_start: int,
    segment_tokens: int,
    history_tokens: int,
) -> None:
    """See `flush.flush`, for one layer of one sequence."""
    segment = slice(segment_start, segment_start + segment_tokens)
    _append(places, history_tokens, memory.keys[:, segment], memory.values[:, segment])
