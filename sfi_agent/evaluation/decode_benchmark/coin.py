"""Drafts that stand with a wanted probability, on a model of random weights.

Which token a random model chooses says nothing, so both choosers are told what to choose from the
position alone: drafts take a token that belongs to it, and dense steps take the same one or, where
the coin of the position says so, another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.sampling import OverridingChooser, Sampler

__all__ = ["CoinChooser"]

# Finaliser of splitmix64 (Steele, Lea and Flood 2014).
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = (1 << 64) - 1


@dataclass(frozen=True)
class CoinChooser(OverridingChooser):
    """An `OverridingChooser` whose tokens depend on the position alone.

    Attributes:
        sampler: What would be drawn, which is computed all the same.
        vocabulary_size: At least 2.
        seed: Of tokens and coin; sequences of a batch have seeds of their own.
        acceptance: Probability that the token is that of the position; 1 for drafts.
    """

    sampler: Sampler
    vocabulary_size: int
    seed: int
    acceptance: float = 1.0

    def at(self, position: int, drawn: int) -> int:
        """The token of a position, whatever was drawn."""
        token = 2 * (_mixed(self.seed, position, 0) % (self.vocabulary_size // 2))
        stands = (_mixed(self.seed, position, 1) >> 11) / (1 << 53) < self.acceptance
        return token if stands else token + 1

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """The token of a position, `[]` int64 on the device of the logits."""
        # What it throws away has to be computed: an honest step draws.
        drawn = self.sampler.choose(logits, position)
        return torch.full_like(drawn, self.at(position, -1))


def _mixed(seed: int, position: int, stream: int) -> int:
    """64 pseudo-random bits."""
    state = (seed * _GAMMA + 2 * position + stream + 1) * _GAMMA & _ALL
    state = (state ^ (state >> 30)) * _MIX_1 & _ALL
    state = (state ^ (state >> 27)) * _MIX_2 & _ALL
    return state ^ (state >> 31)
