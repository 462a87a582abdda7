"""`interval`, `random` and `never`, which look at positions only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sfi_agent import BoundaryDetector, TokenEvent
from sfi_policies import Interval, IntervalConfig, Never, NeverConfig, Random, RandomConfig


def reported(detector: BoundaryDetector, positions: list[int]) -> list[int]:
    """The positions of the tokens a detector reports."""
    return [n for n in positions if detector.after_token(TokenEvent(7, n)) is not None]


@given(every=st.integers(1, 40), start=st.integers(0, 10_000))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_interval_counts_from_the_start_of_the_decoding(every: int, start: int) -> None:
    detector = Interval(IntervalConfig(every_tokens=every))
    positions = list(range(start, start + 100))
    expected = positions[every - 1 :: every]
    for _ in range(2):
        detector.reset([1] * start, "")
        assert reported(detector, positions) == expected


@pytest.mark.parametrize("every", [0, -1])
def test_interval_options_have_ranges(every: int) -> None:
    with pytest.raises(ValidationError):
        IntervalConfig(every_tokens=every)


def test_random_depends_on_seed_and_position_alone() -> None:
    detector = Random(RandomConfig(probability=0.2, seed=5))
    positions = list(range(2000))
    forward = reported(detector, positions)
    assert sorted(reported(detector, positions[::-1])) == forward
    detector.reset([1, 2, 3], "anything")
    assert reported(Random(RandomConfig(probability=0.2, seed=5)), positions) == forward
    assert reported(Random(RandomConfig(probability=0.2, seed=6)), positions) != forward


def test_random_reports_at_its_rate_without_a_pattern() -> None:
    positions = list(range(20_000))
    found = reported(Random(RandomConfig(probability=0.05, seed=1)), positions)
    # Five standard deviations of a binomial count around its mean of 1,000.
    assert abs(len(found) - 1000) < 5 * (20_000 * 0.05 * 0.95) ** 0.5
    followed = sum(1 for one, two in zip(found, found[1:], strict=False) if two == one + 1)
    assert 20 < followed < 90, "neighbours are independent: 50 expected"


@pytest.mark.parametrize(("probability", "count"), [(0.0, 0), (1.0, 500)])
def test_random_at_the_ends_of_its_range(probability: float, count: int) -> None:
    detector = Random(RandomConfig(probability=probability))
    assert len(reported(detector, list(range(500)))) == count


def test_random_without_a_seed_uses_the_default_of_sampling() -> None:
    positions = list(range(500))
    unset = reported(Random(RandomConfig(probability=0.3)), positions)
    assert unset == reported(Random(RandomConfig(probability=0.3, seed=0)), positions)
    assert RandomConfig().seed is None


@pytest.mark.parametrize("probability", [-0.01, 1.01])
def test_random_options_have_ranges(probability: float) -> None:
    with pytest.raises(ValidationError):
        RandomConfig(probability=probability)


def test_never_is_silent() -> None:
    assert reported(Never(NeverConfig()), list(range(500))) == []
