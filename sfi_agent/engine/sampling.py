"""Choosing a token: greedy, or by noise that belongs to a position instead of to a stream.

Sampling is counter-based: the noise of (seed, absolute position, token id) is a hash, not the next
number of a generator. So a draw does not depend on what was drawn before, a rewind or a discarded
draw needs no state to be put back, and rows of a batch cannot disturb each other. Adding Gumbel
noise to log-probabilities and taking the maximum draws from the distribution (the Gumbel-max
trick; Gumbel 1954, Maddison et al. 2014, arXiv 1411.0030).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "AllowedTokens",
    "GivenTokens",
    "OverridingChooser",
    "Sampler",
    "SamplingRows",
    "TokenChooser",
    "entropy_nats",
    "uniform_noise",
]

# Finaliser constants of splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
# One bit less than a float64 holds, so that the half added below is exact and 1.0 never occurs.
_UNIFORM_BITS = 52


class TokenChooser(Protocol):
    """Chooses the token of a position from logits `[vocabulary]`, on their device (`Sampler`)."""

    def choose(self, logits: Tensor, position: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Sampler:
    """Draws the token of a position from logits.

    Attributes:
        temperature: 0 is greedy (ties to the lower id); higher is more random.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: Keep this many most probable tokens; 0 keeps all.
        seed: Which noise to use.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """The token for a position, on the device of the logits and without a host read.

        Args:
            logits: `[vocabulary]` float32.
            position: Absolute position the token will have.

        Returns:
            `[]` int64.
        """
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        # Shifted first, in float64: a tiny temperature then makes zeros and -inf, never two infs.
        scores = self._filtered((logits.double() - logits.max()) / self.temperature)
        uniform = uniform_noise(self.seed, position, logits.shape[-1], logits.device)
        gumbel = -torch.log(-torch.log(uniform))
        return (scores + gumbel).argmax(dim=-1)

    def _filtered(self, scores: Tensor) -> Tensor:
        """Scores with everything outside top-k and top-p set to -inf."""
        lowest = float("-inf")
        if 0 < self.top_k < scores.shape[-1]:
            kth = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < kth, lowest)
        if self.top_p < 1.0:
            ordered, order = scores.sort(descending=True, stable=True)
            probabilities = ordered.softmax(-1)
            # A token stays while the mass before it is below top_p, so the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            ordered = ordered.masked_fill(before >= self.top_p, lowest)
            scores = torch.empty_like(scores).scatter_(-1, order, ordered)
        return scores


class OverridingChooser:
    """Chooses by a sampler, except where it says otherwise from the position alone.

    A base class and not a protocol, because it is asked for several times per token.

    Attributes:
        sampler: Chooses where nothing is overridden.
    """

    sampler: Sampler

    def at(self, position: int, drawn: int) -> int:
        """The token of a position, where the sampler drew another."""
        raise NotImplementedError

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """The token of a position, `[]` int64 on the device of the logits."""
        token = self.at(position, -1)
        if token < 0:
            return self.sampler.choose(logits, position)
        return torch.full((), token, dtype=torch.int64, device=logits.device)


@dataclass(frozen=True)
class GivenTokens(OverridingChooser):
    """Takes tokens as given, whatever the logits say (teacher forcing), and chooses behind them.

    Attributes:
        first_position: Absolute position of the first one.
        token_ids: In order.
        sampler: Chooses what comes after them.
    """

    first_position: int
    token_ids: tuple[int, ...]
    sampler: Sampler

    def at(self, position: int, drawn: int) -> int:
        """The token of a position, where the sampler drew another."""
        index = position - self.first_position
        return self.token_ids[index] if index < len(self.token_ids) else drawn


@dataclass(frozen=True, slots=True, eq=False)
class AllowedTokens:
    """Chooses among some tokens only: the logits of the others count as minus infinity.

    Attributes:
        chooser: Chooses among those left.
        first_position: Absolute position of the first token that is chosen.
        allowed: For it and the positions behind it the tokens that may be chosen, `[vocabulary]`
            bool on the device of the logits; None allows all.
    """

    chooser: TokenChooser
    first_position: int
    allowed: Sequence[Tensor | None]

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """The token of a position, `[]` int64 on the device of the logits."""
        allowed = self.allowed[position - self.first_position]
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        return self.chooser.choose(logits, position)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row of a batch is drawn, on the device, so that a captured step serves any sampler.

    Attributes:
        temperatures: `[rows]` float64; 0 is greedy.
        top_ps: `[rows]` float64.
        top_ks: `[rows]` int64.
        seeds: `[rows]` int64.
    """

    temperatures: Tensor
    top_ps: Tensor
    top_ks: Tensor
    seeds: Tensor

    def choose(self, logits: Tensor, positions: Tensor, *, greedy: bool, filtered: bool) -> Tensor:
        """What `Sampler.choose` draws for each row.

        Args:
            logits: `[rows, vocabulary]` float32.
            positions: `[rows]` int64, absolute positions the tokens will have.
            greedy: Whether every row is greedy, which saves the noise.
            filtered: Whether some row has a top-k or top-p.

        Returns:
            `[rows]` int64.
        """
        best = logits.argmax(dim=-1)
        if greedy:
            return best
        divisor = torch.where(self.temperatures > 0.0, self.temperatures, 1.0)[:, None]
        scores = (logits.double() - logits.amax(-1, keepdim=True)) / divisor
        if filtered:
            scores = self._filtered(scores)
        uniform = _uniform(self.seeds, positions, logits.shape[-1])
        gumbel = -torch.log(-torch.log(uniform))
        drawn = (scores + gumbel).argmax(dim=-1)
        return torch.where(self.temperatures > 0.0, drawn, best)

    def _filtered(self, scores: Tensor) -> Tensor:
        """See `Sampler`; one sort serves both filters."""
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        size = scores.shape[-1]
        wanted = torch.where(self.top_ks > 0, self.top_ks, size).clamp(max=size)[:, None]
        kth = ordered.gather(-1, wanted - 1)
        ordered = ordered.masked_fill(ordered < kth, float("-inf"))
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        keeps_all = (self.top_ps >= 1.0)[:, None]
        ordered = ordered.masked_fill((before >= self.top_ps[:, None]) & ~keeps_all, float("-inf"))
        return torch.empty_like(scores).scatter_(-1, order, ordered)


def entropy_nats(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, float32 over the last dimension; 0 is certain,
    log(vocabulary) is flat."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities.clamp(min=-1e30)).sum(-1)


def uniform_noise(seed: int, position: int, size: int, device: torch.device) -> Tensor:
    """Uniform numbers in (0, 1) that depend on (seed, position, index) alone: `[size]` float64."""
    # Filled on the device: copying a number there would make the host wait.
    place = torch.full((2, 1), seed, dtype=torch.int64, device=device)
    place[1] = position
    return _uniform(place[0], place[1], size)[0]


def _uniform(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """The same for rows: seeds and positions `[rows]` int64 to `[rows, size]` float64."""
    key = _mix(_mix(seeds * _GAMMA + positions * _MIX_1) + _GAMMA)
    index = torch.arange(1, size + 1, dtype=torch.int64, device=seeds.device)
    bits = _shift_right(_mix(key[:, None] + index * _GAMMA), 64 - _UNIFORM_BITS)
    return (bits.double() + 0.5) / float(1 << _UNIFORM_BITS)


def _mix(state: Tensor) -> Tensor:
    """The splitmix64 finaliser; 64-bit products wrap around as intended."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts signed integers arithmetically."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
