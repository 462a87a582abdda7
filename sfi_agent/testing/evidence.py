"""Seeded evidence for tests of selectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfi_agent.errors import InputError, explain
from sfi_agent.protocols import Evidence

if TYPE_CHECKING:
    import torch

__all__ = ["make_evidence"]


def make_evidence(
    *,
    seed: int = 0,
    batch: int = 1,
    kv_heads: int = 2,
    rows: int = 2,
    candidates: int = 64,
    candidate_start: int = 4,
    logit_scale: float = 2.0,
    masked_share: float = 0.0,
    key_norms: bool = True,
    device: str | torch.device = "cpu",
) -> Evidence:
    """Random evidence as a dense step would hand it over, equal for equal arguments.

    Args:
        seed: Seed of the CPU generator that draws everything; the device does not matter.
        batch, kv_heads, rows, candidates: Shape of the logits, each at least 1; rows are queries x
            query heads of a KV head's group.
        candidate_start: Absolute position of the first candidate.
        logit_scale: Standard deviation of the logits; 0 makes all candidates equal.
        masked_share: Share of entries set to -inf, 0 to 1; 1 leaves no row anything to see.
        key_norms: Whether the evidence carries key norms (around 2), for selectors that need them.
        device: Where the tensors are put.

    Returns:
        Logits `[batch, kv_heads, rows, candidates]`, key norms `[batch, kv_heads, candidates]` or
        None, rest mass `[batch, kv_heads, rows]` between 0 and 1; all float32.

    Raises:
        InputError: A count is below 1, or `masked_share` is not between 0 and 1.
    """
    import torch

    shape = (batch, kv_heads, rows, candidates)
    _check_arguments(shape, masked_share)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * logit_scale
    masked = torch.rand(shape, generator=generator) < masked_share
    norms = torch.rand((batch, kv_heads, candidates), generator=generator) * 2.0 + 1.0
    return Evidence(
        logits=logits.masked_fill(masked, -torch.inf).to(device),
        key_norms=norms.to(device) if key_norms else None,
        rest_mass=torch.rand((batch, kv_heads, rows), generator=generator).to(device),
        candidate_start=candidate_start,
    )


def _check_arguments(shape: tuple[int, ...], masked_share: float) -> None:
    if min(shape) < 1 or not 0.0 <= masked_share <= 1.0:
        raise InputError(
            explain(
                "Making evidence",
                got=f"(batch, kv_heads, rows, candidates) = {shape}, masked_share={masked_share}",
                allowed="counts of at least 1 and a masked_share between 0 and 1",
            )
        )
