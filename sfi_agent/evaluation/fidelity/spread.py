"""Summaries of many numbers: mean and nearest-rank quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "mean", "nearest_rank"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median and 99th percentile of a set of numbers.

    Attributes:
        mean: Arithmetic mean.
        p50: Median, by nearest rank.
        p99: 99th percentile, by nearest rank: of fewer than 100 numbers it is the largest.
    """

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one number."""
        return cls(mean(values), nearest_rank(values, 0.5), nearest_rank(values, 0.99))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one number, summed exactly."""
    return math.fsum(values) / len(values)


def nearest_rank(values: Sequence[float], share: float) -> float:
    """The smallest number that at least this share (above 0, at most 1) of the numbers reach.

    Always one of the numbers, so equal inputs give equal outputs on every machine.
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
