"""The length of drafts: the published formula, its bounds, and what it learns from."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.engine.draft_length import _VERIFYING_COST, DraftLength

quick = settings(max_examples=150, derandomize=True, deadline=None, database=None)
bounds = st.tuples(st.integers(1, 60), st.integers(0, 80)).map(lambda b: (b[0], b[0] + b[1]))


def with_acceptance(p: float, low: int, high: int) -> DraftLength:
    return DraftLength(low, high, accepted=p, rejected=1.0 - p)


def yield_per_cost(p: float, drafts: int) -> float:
    """By definition: the chance that exactly n drafts stand, times n + 1 tokens."""
    tokens = sum(p**n * (1 - p) * (n + 1) for n in range(drafts)) + p**drafts * (drafts + 1)
    return tokens / (drafts + _VERIFYING_COST)


@quick
@given(p=st.floats(0.0, 1.0), bounds=bounds)
def test_the_best_length_of_all(p: float, bounds: tuple[int, int]) -> None:
    low, high = bounds
    chosen = with_acceptance(p, low, high).tokens()
    assert low <= chosen <= high
    best = max(yield_per_cost(p, drafts) for drafts in range(low, high + 1))
    assert yield_per_cost(p, chosen) == pytest.approx(best, rel=1e-9)


@quick
@given(p=st.floats(0.0, 1.0), q=st.floats(0.0, 1.0), bounds=bounds)
def test_higher_acceptance_never_means_shorter_drafts(
    p: float, q: float, bounds: tuple[int, int]
) -> None:
    lower, higher = sorted((p, q))
    assert with_acceptance(lower, *bounds).tokens() <= with_acceptance(higher, *bounds).tokens()


def test_the_ends_of_the_range() -> None:
    assert with_acceptance(0.0, 3, 40).tokens() == 3
    assert with_acceptance(1.0, 3, 40).tokens() == 40
    assert with_acceptance(0.5, 7, 7).tokens() == 7


@quick
@given(
    seen=st.lists(
        st.tuples(st.integers(0, 40), st.floats(0.0, 1.0)).map(lambda d: (d[0], int(d[0] * d[1]))),
        max_size=60,
    ),
    bounds=bounds,
)
def test_any_history_gives_a_probability_and_a_length(
    seen: list[tuple[int, int]], bounds: tuple[int, int]
) -> None:
    length = DraftLength(*bounds)
    for drafted, accepted in seen:
        before = length.acceptance
        length.note(drafted, accepted)
        assert 0.0 <= length.acceptance <= 1.0
        if drafted == accepted:
            assert length.acceptance >= before or math.isclose(length.acceptance, before)
        elif accepted == 0:
            assert length.acceptance <= before
        assert bounds[0] <= length.tokens() <= bounds[1]


def test_it_follows_what_it_sees() -> None:
    length = DraftLength(1, 96)
    first = length.tokens()
    for _ in range(30):
        length.note(10, 0)
    assert length.acceptance < 0.1
    assert length.tokens() == 1 < first
    for _ in range(60):
        length.note(10, 10)
    assert length.acceptance > 0.99
    assert length.tokens() > first


def test_the_estimate_converges_to_the_true_share() -> None:
    """Segments of which each draft stands with probability 0.8: the first rejection ends it."""
    import random

    lots, length, estimates = random.Random(1), DraftLength(1, 64), []
    for round_number in range(4000):
        drafted = 12
        accepted = next((n for n in range(drafted) if lots.random() > 0.8), drafted)
        length.note(drafted, accepted)
        if round_number > 100:
            estimates.append(length.acceptance)
    assert sum(estimates) / len(estimates) == pytest.approx(0.8, abs=0.03)


def test_segments_without_drafts_say_nothing() -> None:
    """As when a detector retries every fast step of a long generation."""
    length = DraftLength(1, 64)
    for _ in range(20_000):
        length.note(0, 0)
    assert length.acceptance == DraftLength(1, 64).acceptance
    assert length.tokens() == DraftLength(1, 64).tokens()
