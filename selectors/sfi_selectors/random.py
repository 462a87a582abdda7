"""A seeded random choice: what a budget is worth without looking at the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sfi_agent import Evidence, Selection, Settings
from sfi_selectors._ranking import choose

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Random", "RandomConfig"]

_WORD = 0xFFFFFFFF
_FIRST_FACTOR = 0x7FEB352D
_SECOND_FACTOR = 0x846CA68B - (1 << 32)  # equal modulo 2**32, and its products stay within int64


class RandomConfig(Settings):
    """Options of `random`."""

    seed: int | None = Field(
        default=None,
        description="Seed of the choice; None means the session's sampling.seed, and 0 outside "
        "a session.",
        json_schema_extra={"unit": "number"},
    )


class Random:
    """A uniformly random set per KV head, the same for the same shape of evidence and seed.

    Counter-based: a candidate's rank is a 32-bit hash of (seed, candidate_start, number of
    candidates, head, candidate), computed with integers on the evidence's device. So no generator
    state must be kept over rewinds and forks, and batch mates do not matter. All sequences of a
    batch and all layers draw alike. Equal hashes go to the lower position.

    Source: the random baseline of sparse-attention ablations; the hash is the two-round
    multiply-xorshift `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018).
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: RandomConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Only its shape, `candidate_start` and device are used.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1.
        """
        import torch

        batch, heads, _, candidates = evidence.logits.shape
        device = evidence.logits.device
        start = evidence.candidate_start
        stream = _mix_numbers(self.config.seed or 0, start, candidates)
        head = _mix((torch.arange(heads, device=device) + stream) & _WORD)
        index = torch.arange(candidates, device=device)
        hashes = _mix(head.unsqueeze(-1) ^ _mix(index))
        keys = (hashes << 31) | (candidates - 1 - index)
        return choose(keys.expand(batch, -1, -1), budget, start)


def _mix(words: Tensor) -> Tensor:
    """Hash 32-bit words, held in int64 so that no product overflows; `words`' shape."""
    words = words ^ (words >> 16)
    words = (words * _FIRST_FACTOR) & _WORD
    words = words ^ (words >> 15)
    words = (words * _SECOND_FACTOR) & _WORD
    return words ^ (words >> 16)


def _mix_numbers(*numbers: int) -> int:
    """Hash integers of any size, in order, to one 32-bit word on the host."""
    state = 0
    for signed in numbers:
        number = 2 * signed if signed >= 0 else -2 * signed - 1
        while True:
            state ^= number & _WORD
            state ^= state >> 16
            state = (state * _FIRST_FACTOR + 1) & _WORD
            state ^= state >> 15
            state = (state * _SECOND_FACTOR) & _WORD
            state ^= state >> 16
            number >>= 32
            if number == 0:
                break
    return state
