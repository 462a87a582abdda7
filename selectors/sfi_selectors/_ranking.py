"""From one score per candidate to a selection. Knows nothing of attention.

Candidates are ranked by int64 keys that are all different: the score's bits, ordered like the
scores, above the position, lower first. A partial top-k over distinct keys has one answer on every
device, which `torch.topk` does not promise for equal scores, and costs a fraction of a stable sort
of all candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfi_agent import InputError, Selection

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_LOW_BITS = 32
_LOW_MASK = 0xFFFFFFFF


def ordered_bits(scores: Tensor) -> Tensor:
    """Map float32 scores to integers of 32 bits with the same order; -0.0 equals 0.0.

    Args:
        scores: `[...]` float32 without NaN, -inf allowed.

    Returns:
        `[...]` int64 within the range of int32.
    """
    import torch

    scores = torch.where(scores == 0, 0.0, scores)
    bits = scores.contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _indices(like: Tensor) -> Tensor:
    import torch

    return torch.arange(like.shape[-1], device=like.device)


def ranking_keys(scores: Tensor, first: int = 0) -> Tensor:
    """Distinct keys: higher scores first, among equal scores the lower position first.

    Args:
        scores: `[batch, kv_heads, candidates]` float32, higher is better.
        first: Index of the first of these candidates.

    Returns:
        `[batch, kv_heads, candidates]` int64, the higher the earlier chosen. The lower 32 bits
        hold the complement of the candidate's index.
    """
    return (ordered_bits(scores) << _LOW_BITS) | (_LOW_MASK - first - _indices(scores))


def keys_around_peaks(peaks: Tensor, reach_tokens: int) -> Tensor:
    """Distinct keys that spend a budget peak by peak, each from its middle outwards.

    Order: the higher peak first (ties: the peak at the lower position); around one peak the nearest
    token first, at equal distance the following one, since text is copied forwards.

    Args:
        peaks: `[batch, kv_heads, candidates]` int64, for every candidate the ranking key of the
            peak that it belongs to.
        reach_tokens: Largest distance between a candidate and its peak.

    Raises:
        InputError: Index and distance do not fit into 32 bits together.
    """
    candidates = peaks.shape[-1]
    place_bits = (2 * reach_tokens).bit_length()
    if (candidates - 1).bit_length() + place_bits > _LOW_BITS:
        raise InputError(
            f"Ranking tokens around their peaks; got {candidates} candidates with a reach of "
            f"{reach_tokens} tokens; allowed: at most {1 << (_LOW_BITS - place_bits)} candidates "
            "at this reach. Choose a smaller radius_tokens or page_tokens."
        )
    peak_index = _LOW_MASK - (peaks & _LOW_MASK)
    distance = _indices(peaks) - peak_index
    place = 2 * distance.abs() - (distance > 0).long()
    low = ((candidates - 1 - peak_index) << place_bits) | ((1 << place_bits) - 1 - place)
    return ((peaks >> _LOW_BITS) << _LOW_BITS) | low


def sliding_maximum(values: Tensor, radius: int) -> Tensor:
    """Largest value within `radius` places to either side, the end places included.

    Windows double in width at each step, so the cost grows with the logarithm of the radius.

    Args:
        values: `[..., candidates]` float32 or int64.
        radius: Places to either side, at least 0.
    """
    import torch

    radius = min(radius, values.shape[-1] - 1)
    if radius <= 0:
        return values
    floating = values.dtype.is_floating_point
    lowest = -torch.inf if floating else torch.iinfo(values.dtype).min
    pooled = torch.constant_pad_nd(values, (radius, radius), lowest)
    width, wanted = 1, 2 * radius + 1
    while width < wanted:
        step = min(width, wanted - width)
        pooled = torch.maximum(pooled[..., :-step], pooled[..., step:])
        width += step
    return pooled


def checked_count(budget: int, candidates: int) -> int:
    """Places that can be filled: the budget, or every candidate where there are fewer.

    Raises:
        InputError: The budget is below 1.
    """
    if budget < 1:
        raise InputError(
            f"Selecting candidates; got a budget of {budget!r}; allowed: at least 1. "
            "A session without selected tokens (memory.selected_tokens: 0) asks no selector."
        )
    return min(budget, candidates)


def padded_selection(indices: Tensor, counts: Tensor, budget: int, start: int) -> Selection:
    """Put ascending candidate indices into the form that the contract asks for.

    Args:
        indices: `[batch, kv_heads, places]` int64, the first `counts` of each head ascending, the
            rest of no meaning.
        counts: `[batch, kv_heads]` int64.
        budget: Width of the result, at least `places`.
        start: Absolute position of candidate 0.
    """
    import torch

    places = indices.shape[-1]
    valid = _indices(indices) < counts.unsqueeze(-1)
    positions = torch.where(valid, indices + start, torch.full_like(indices, -1))
    if places < budget:
        positions = torch.constant_pad_nd(positions, (0, budget - places), -1)
    return Selection(positions=positions, counts=counts)


def choose(keys: Tensor, budget: int, start: int) -> Selection:
    """Select the candidates with the highest keys, exactly min(budget, candidates) per head.

    Args:
        keys: `[batch, kv_heads, candidates]` int64, distinct within a head.
        budget: Places per KV head, at least 1.
        start: Absolute position of candidate 0.
    """
    import torch

    count = checked_count(budget, keys.shape[-1])
    if count == keys.shape[-1]:
        indices = _indices(keys).expand(keys.shape)
    else:
        chosen = keys.topk(count, dim=-1, sorted=False).indices
        indices = chosen.sort(dim=-1).values
    counts = torch.full(keys.shape[:-1], count, dtype=torch.int64, device=keys.device)
    return padded_selection(indices, counts, budget, start)


def choose_from_pieces(
    pieces: Iterable[tuple[int, Tensor]], candidates: int, budget: int, start: int
) -> Selection:
    """`choose` by scores that come in pieces: the best so far go on, the others are forgotten.

    Args:
        pieces: Of the candidates in order: the index of the first one, and scores
            `[batch, kv_heads, tokens]` float32, higher is better.
        candidates: How many there are in all, at least 1.
        budget: Places per KV head, at least 1.
        start: Absolute position of candidate 0.
    """
    import torch

    count = checked_count(budget, candidates)
    best = None
    for first, scores in pieces:
        keys = ranking_keys(scores, first)
        best = keys if best is None else torch.cat([best, keys], dim=-1)
        if best.shape[-1] > count:
            best = best.topk(count, dim=-1, sorted=False).values
    assert best is not None
    indices = (_LOW_MASK - (best & _LOW_MASK)).sort(dim=-1).values
    counts = torch.full(best.shape[:-1], count, dtype=torch.int64, device=best.device)
    return padded_selection(indices, counts, budget, start)
