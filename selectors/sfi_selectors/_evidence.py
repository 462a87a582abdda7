"""From attention logits to one score per candidate. Knows nothing of budgets and choices.

Reductions over rows and heads are folded in halves by elementwise additions. A library reduction
over a strided axis may add the columns of one tensor in different orders (vector body and remainder
of a loop), which would give two candidates with equal evidence scores that differ in the last bit
and so break the rule that ties go to the lower position. Folding adds every column alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sfi_agent import Evidence

PIECE_NUMBERS = 1 << 18
"""On a CPU logits are worked on in pieces of this many numbers: what is made of them on the way
stays in the cache, and how much is allocated does not depend on the history's length."""

REST_MASS_RESOLUTION = 2.0**-24
"""Distance from 1 to the float32 number below it: no smaller candidate mass can be told from 0."""


def fold_rows(values: Tensor) -> Tensor:
    """Sum over the last axis but one; every column's terms are added in the same order.

    Args:
        values: `[..., rows, candidates]` float32. Used as working space: its content is lost.

    Returns:
        `[..., candidates]` float32.
    """
    while (rows := values.shape[-2]) > 1:
        kept = rows - rows // 2
        values[..., : rows // 2, :] += values[..., kept:, :]
        values = values[..., :kept, :]
    return values.squeeze(-2)


def finite_peak(values: Tensor) -> Tensor:
    """Maximum over the last axis but one, kept as an axis of 1; 0 where all is -inf.

    Subtracting it before an exponential prevents overflow, and -inf - (-inf) as well.
    """
    import torch

    peak = values.amax(dim=-2, keepdim=True)
    return torch.where(peak > -torch.inf, peak, 0.0)


def log_sum_rows(values: Tensor) -> Tensor:
    """Log of the sum of exponentials over the last axis but one.

    Args:
        values: `[..., rows, candidates]` float32 logarithms, -inf allowed, left unchanged.

    Returns:
        `[..., candidates]` float32; -inf where every row is -inf. Columns that hold the same
        numbers give bit-identical results.
    """
    if values.shape[-2] == 1:
        return values.squeeze(-2)
    peak = finite_peak(values)
    return fold_rows((values - peak).exp_()).log() + peak.squeeze(-2)


def piece_tokens(logits: Tensor) -> int:
    """How many candidates of `[batch, kv_heads, rows, candidates]` to take at a time."""
    batch, heads, rows, candidates = logits.shape
    if logits.device.type != "cpu":
        return candidates
    return min(candidates, max(1, PIECE_NUMBERS // (batch * heads * rows)))


def row_log_normaliser(logits: Tensor) -> Tensor:
    """What to subtract from each row so that its exponentials sum to 1 over the candidates.

    Args:
        logits: `[batch, kv_heads, rows, candidates]` float32.

    Returns:
        `[batch, kv_heads, rows, 1]` float32. +inf for a row without a finite entry: subtracting it
        leaves -inf everywhere, so that such a row contributes nothing, without a NaN on the way.
    """
    import torch

    size = piece_tokens(logits)
    normaliser = logits[..., :size].logsumexp(dim=-1, keepdim=True)
    if size < logits.shape[-1]:
        rest = logits[..., size:].split(size, -1)
        parts = [part.logsumexp(dim=-1, keepdim=True) for part in rest]
        normaliser = torch.cat([normaliser, *parts], dim=-1).logsumexp(dim=-1, keepdim=True)
    return torch.where(normaliser > -torch.inf, normaliser, torch.inf)


def row_log_scale(evidence: Evidence) -> Tensor:
    """What to add to each row's logits to get `row_log_mass`: `[batch, kv_heads, rows, 1]`."""
    share = (1.0 - evidence.rest_mass.float()).clamp(REST_MASS_RESOLUTION, 1.0)
    return share.log().unsqueeze(-1) - row_log_normaliser(evidence.logits.float())


def row_log_mass(evidence: Evidence) -> Tensor:
    """Logarithm of each row's attention probability of each candidate, rest included.

    A row's probability is p(k) * (1 - rest_mass), p normalised over the candidates: the attention
    that the dense step really paid. Normalising over the candidates alone would let a head that
    spends 99 % on the sink speak as loudly as one that looks at the middle of the history.

    Returns:
        `[batch, kv_heads, rows, candidates]` float32, a new tensor; -inf where masked.
    """
    return evidence.logits.float() + row_log_scale(evidence)


def head_log_mass_pieces(evidence: Evidence) -> Iterator[tuple[int, Tensor]]:
    """`head_log_mass`, a piece of the candidates at a time, in order.

    Yields:
        The index of the piece's first candidate, and its scores `[batch, kv_heads, tokens]`
        float32, which the caller may change.
    """
    logits, scale = evidence.logits.float(), row_log_scale(evidence)
    size = piece_tokens(logits)
    for low in range(0, logits.shape[-1], size):
        yield low, log_sum_rows(logits[..., low : low + size] + scale)


def head_log_mass(evidence: Evidence) -> Tensor:
    """Log of the summed attention mass of each candidate, per KV head; higher is better.

    The sum over rows ranks as their mean does. Logarithms keep candidates apart whose
    probabilities would underflow.

    Returns:
        `[batch, kv_heads, candidates]` float32; -inf where no row may see the candidate.
    """
    import torch

    pieces = [scores for _, scores in head_log_mass_pieces(evidence)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
