"""Counter-based sampling: distribution, independence, filters, entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent.engine.sampling import (
    GivenTokens,
    OverridingChooser,
    Sampler,
    SamplingRows,
    entropy_nats,
    uniform_noise,
)

CPU = torch.device("cpu")
DRAWS = 4000
LOGITS = torch.tensor([1.5, 0.2, -0.7, 2.1, 0.0, -3.0, 1.1, 0.4])


def counts_of(sampler: Sampler, logits: Tensor, first: int = 0) -> Tensor:
    drawn = [int(sampler.choose(logits, first + position)) for position in range(DRAWS)]
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[-1]).double()


def chi_square_probability(counts: Tensor, probabilities: Tensor) -> float:
    """How likely a fit this bad is by chance, in the Wilson-Hilferty approximation."""
    kept = probabilities > 0
    assert not counts[~kept].any(), "drew a token of probability 0"
    expected = probabilities[kept].double() * counts.sum()
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    degrees = int(kept.sum()) - 1
    if degrees == 0:
        return 1.0
    spread = 2.0 / (9.0 * degrees)
    normal = ((statistic / degrees) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(normal / math.sqrt(2.0))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("seed", [0, 12345])
def test_draws_follow_the_softmax(temperature: float, seed: int) -> None:
    counts = counts_of(Sampler(temperature, seed=seed), LOGITS)
    assert chi_square_probability(counts, (LOGITS / temperature).softmax(-1)) > 1e-3


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (3, 1.0, {0, 3, 6}),
        (0, 0.5, {0, 3}),
        (0, 0.9, {0, 1, 3, 6, 7}),
        (2, 0.99, {0, 3}),
        (0, 1e-6, {3}),
        (1, 1.0, {3}),
        (100, 1.0, set(range(8))),
    ],
)
def test_filtered_draws_follow_the_renormalised_rest(
    top_k: int, top_p: float, kept: set[int]
) -> None:
    counts = counts_of(Sampler(1.0, top_p, top_k, seed=7), LOGITS)
    probabilities = LOGITS.softmax(-1)
    outside = [token for token in range(8) if token not in kept]
    probabilities[outside] = 0.0
    assert chi_square_probability(counts, probabilities / probabilities.sum()) > 1e-3
    assert set(counts.nonzero().flatten().tolist()) <= kept


def test_a_wrong_distribution_would_be_noticed() -> None:
    counts = counts_of(Sampler(1.0, seed=3), LOGITS)
    assert chi_square_probability(counts, (LOGITS / 1.15).softmax(-1)) < 1e-3


def test_noise_is_uniform_and_never_0_or_1() -> None:
    noise = uniform_noise(5, 77, 100_000, CPU)
    assert noise.dtype == torch.float64
    assert 0.0 < float(noise.min()) and float(noise.max()) < 1.0
    counts = torch.histc(noise, bins=50, min=0.0, max=1.0)
    assert chi_square_probability(counts, torch.full((50,), 0.02)) > 1e-3


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 300), st.integers(1, 300))
def test_noise_of_a_token_does_not_depend_on_the_vocabulary_size(
    seed: int, position: int, small: int, large: int
) -> None:
    small, large = sorted((small, large))
    noise = uniform_noise(seed, position, large, CPU)
    assert torch.equal(uniform_noise(seed, position, small, CPU), noise[:small])


def test_seeds_positions_and_tokens_are_decorrelated() -> None:
    """Neighbouring seeds and positions, and those that differ in one high bit."""
    size, limit = 20_000, 0.03
    base = uniform_noise(1, 1, size, CPU)
    others = [(1, 2), (2, 1), (2, 2), (1, 1 + 2**32), (1 + 2**62, 1), (0, 1), (1, 0)]
    for seed, position in others:
        noise = uniform_noise(seed, position, size, CPU)
        assert abs(float(torch.corrcoef(torch.stack([base, noise]))[0, 1])) < limit
        for shift in (1, 2, 7):
            shifted = torch.stack([base[shift:], noise[:-shift]])
            assert abs(float(torch.corrcoef(shifted)[0, 1])) < limit
    of_a_token = torch.stack([uniform_noise(1, position, 3, CPU)[1] for position in range(4000)])
    pairs = torch.stack([of_a_token[:-1], of_a_token[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.06


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(
    st.integers(0, 2**63 - 1),
    st.floats(0.05, 5.0),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([0, 1, 5]),
)
def test_a_draw_does_not_depend_on_other_draws(
    seed: int, temperature: float, top_p: float, top_k: int
) -> None:
    sampler = Sampler(temperature, top_p, top_k, seed)
    alone = [int(sampler.choose(LOGITS, position)) for position in range(6)]
    backwards = [int(sampler.choose(LOGITS, position)) for position in reversed(range(6))]
    assert alone == backwards[::-1]
    assert alone == [
        int(Sampler(temperature, top_p, top_k, seed).choose(LOGITS, p)) for p in range(6)
    ]


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.floats(1e-6, 1.0))
def test_top_p_keeps_the_smallest_set_and_always_the_first(
    values: list[float], top_p: float
) -> None:
    logits = torch.tensor(values)
    kept = Sampler(1.0, top_p)._filtered(logits) > float("-inf")
    assert bool(kept[logits.argmax()])
    probabilities = logits.double().softmax(-1)
    assert float(probabilities[kept].sum()) >= min(top_p, 1.0) - 1e-5
    least = probabilities[kept].min()
    assert float(probabilities[kept].sum() - least) < top_p + 1e-5
    assert bool((probabilities[~kept] <= least + 1e-12).all())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_tiny_temperature_is_nearly_greedy(temperature: float) -> None:
    for position in range(20):
        assert int(Sampler(temperature, top_p=0.9).choose(LOGITS, position)) == 3


def test_greedy_takes_the_lower_id_of_a_tie() -> None:
    assert int(Sampler().choose(torch.tensor([0.0, 2.0, 1.0, 2.0]), 0)) == 1


def test_entropy_is_in_nats() -> None:
    torch.testing.assert_close(entropy_nats(torch.zeros(101)), torch.tensor(math.log(101)))
    assert float(entropy_nats(torch.tensor([0.0, float("-inf"), float("-inf")]))) == 0.0
    assert float(entropy_nats(torch.tensor([1000.0, 0.0]))) == pytest.approx(0.0, abs=1e-6)
    probabilities = LOGITS.softmax(-1)
    expected = -(probabilities * probabilities.log()).sum()
    torch.testing.assert_close(entropy_nats(LOGITS), expected)


samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.0, 1e-4, 0.3, 1.0, 4.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(samplers, st.integers(0, 2**40)), min_size=1, max_size=9),
    st.integers(2, 300),
    st.integers(0, 2**30),
    st.sampled_from([0.1, 3.0, 30.0]),
)
def test_rows_draw_what_their_samplers_draw(
    rows: list[tuple[Sampler, int]], vocabulary: int, seed: int, spread: float
) -> None:
    """Ties included: logits are rounded, so that several are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(rows), vocabulary, generator=generator) * spread).round(decimals=1)
    drawn = [sampler for sampler, _ in rows]
    together = SamplingRows(
        torch.tensor([sampler.temperature for sampler in drawn], dtype=torch.float64),
        torch.tensor([sampler.top_p for sampler in drawn], dtype=torch.float64),
        torch.tensor([sampler.top_k for sampler in drawn]),
        torch.tensor([sampler.seed for sampler in drawn]),
    )
    positions = torch.tensor([position for _, position in rows])
    expected = [
        int(sampler.choose(row, position))
        for row, (sampler, position) in zip(logits, rows, strict=True)
    ]
    filters = any(sampler.top_k or sampler.top_p < 1.0 for sampler in drawn)
    greedy = all(sampler.temperature == 0.0 for sampler in drawn)
    for all_greedy in {greedy, False}:
        for filtered in {filters, True}:
            got = together.choose(logits, positions, greedy=all_greedy, filtered=filtered)
            assert got.tolist() == expected


def test_given_tokens_override_a_sampler_and_a_sampler_overrides_nothing() -> None:
    given_tokens = GivenTokens(5, (3, 4), Sampler(seed=1))
    assert isinstance(given_tokens, OverridingChooser)
    assert not isinstance(Sampler(), OverridingChooser)
    assert [given_tokens.at(position, 9) for position in (5, 6, 7)] == [3, 4, 9]
    assert [int(given_tokens.choose(LOGITS, position)) for position in (5, 6, 7)] == [3, 4, 3]
