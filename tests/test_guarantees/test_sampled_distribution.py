"""The noise of sampling belongs to positions: draws over positions and over seeds are fair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sfi_agent.engine.sampling import Sampler

DRAWS = 4000
LOGITS = torch.tensor([0.9, 0.2, -0.4, 1.3, 0.0, -1.5])
SIZE = len(LOGITS)
PROBABILITIES = LOGITS.double().softmax(-1)
LARGEST_SEED = 2**63 - 1


def likelihood_ratio_probability(counts: Tensor, expected: Tensor, degrees: int) -> float:
    """How likely a G statistic this large is by chance (upper tail of chi-square)."""
    met = counts > 0
    statistic = 2.0 * (counts[met] * (counts[met] / expected[met]).log()).sum()
    half = torch.tensor(degrees / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2.0))


def drawn(choose: Callable[[int], Tensor], draws: int = DRAWS) -> Tensor:
    return torch.stack([choose(index) for index in range(draws)])


def over_positions(seed: int, first: int = 0, temperature: float = 1.0) -> Tensor:
    sampler = Sampler(temperature, seed=seed)
    return drawn(lambda index: sampler.choose(LOGITS, first + index))


def over_seeds(position: int, first: int = 0) -> Tensor:
    return drawn(lambda index: Sampler(1.0, seed=first + index).choose(LOGITS, position))


def fairness(tokens: Tensor, probabilities: Tensor = PROBABILITIES) -> float:
    counts = torch.bincount(tokens, minlength=SIZE).double()
    return likelihood_ratio_probability(counts, probabilities * len(tokens), SIZE - 1)


def independence(first: Tensor, second: Tensor) -> float:
    """A contingency table of two sequences of tokens."""
    table = torch.bincount(first * SIZE + second, minlength=SIZE * SIZE).double().view(SIZE, SIZE)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    return likelihood_ratio_probability(table, expected, (SIZE - 1) ** 2)


@pytest.mark.parametrize(("seed", "first"), [(0, 0), (LARGEST_SEED, 10**9)])
def test_draws_over_positions(seed: int, first: int) -> None:
    tokens = over_positions(seed, first)
    assert fairness(tokens) > 1e-3
    for distance in (1, 2, 16):
        assert independence(tokens[:-distance], tokens[distance:]) > 1e-3
    assert independence(tokens, over_positions(seed ^ 1, first)) > 1e-3


@pytest.mark.parametrize(("position", "first"), [(0, 0), (131_071, LARGEST_SEED - DRAWS)])
def test_draws_over_seeds(position: int, first: int) -> None:
    tokens = over_seeds(position, first)
    assert fairness(tokens) > 1e-3
    assert independence(tokens[:-1], tokens[1:]) > 1e-3
    assert independence(tokens, over_seeds(position + 1, first)) > 1e-3


def test_draws_over_both_at_once() -> None:
    """Along the diagonals, where a hash of sums would repeat itself."""
    for step in (1, -1):
        tokens = drawn(lambda i, step=step: Sampler(1.0, seed=9000 + step * i).choose(LOGITS, i))  # type: ignore[misc]
        assert fairness(tokens) > 1e-3
        assert independence(tokens[:-1], tokens[1:]) > 1e-3


def test_unfair_or_dependent_draws_would_be_noticed() -> None:
    tokens = over_positions(3)
    assert fairness(tokens, (LOGITS.double() / 1.2).softmax(-1)) < 1e-3
    lagging = torch.where(torch.arange(len(tokens)) % 6 == 0, tokens, tokens.roll(1))
    assert independence(tokens, lagging) < 1e-3
    mixed = torch.where(torch.arange(len(tokens)) % 5 == 0, tokens, over_positions(4))
    assert independence(tokens, mixed) < 1e-3
