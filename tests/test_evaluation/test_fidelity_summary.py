"""Summaries of steps whose numbers are chosen by hand."""

from __future__ import annotations

from typing import Literal

import pytest

from sfi_agent import StepRecord
from sfi_agent.evaluation.fidelity import Acceptance, Step
from sfi_agent.evaluation.fidelity.summary import (
    DISTANCES,
    ForcedTokens,
    FreeTokens,
    summarize_forced,
    summarize_free,
)

Row = tuple[Literal["fast", "slow", "retry"], int, float, bool, float]
ROWS: tuple[Row, ...] = (
    # kind, segment tokens, KL, agrees, entropy
    ("slow", 0, 0.0, True, 0.1),
    ("fast", 1, 0.1, True, 0.1),
    ("fast", 2, 0.4, False, 0.9),
    ("fast", 3, 0.1, True, 0.31),
    ("retry", 0, 0.0, True, 2.0),
    ("fast", 1, 0.4, True, 0.3),
)


def record(index: int, row: Row) -> StepRecord:
    kind, segment_tokens = row[:2]
    return StepRecord(
        kind=kind,
        slow_step=None if kind == "fast" else "observe",
        reason="prefill" if index == 0 else "",
        memory_tokens=10 + index,
        segment_tokens=segment_tokens,
        seconds=1.0,
        position=100 + index,
        token_id=7,
        dense_passes=int(kind != "fast" and index > 0),
    )


def tokens(*, verified: bool = False) -> ForcedTokens:
    return ForcedTokens(
        [record(index, row) for index, row in enumerate(ROWS)],
        [Step(kl, agrees, entropy) for _, _, kl, agrees, entropy in ROWS],
        verified,
    )


def test_forced_tokens() -> None:
    found = summarize_forced(tokens())
    assert found.tokens == 6
    assert found.agreement == 5 / 6
    assert (found.kl_nats.mean, found.kl_nats.p50, found.kl_nats.p99) == pytest.approx(
        (1.0 / 6, 0.1, 0.4)
    )
    assert found.slow_share == 1 / 6, "a prefill is none, a retry is one"
    shares = [(10 + index) / (100 + index) for index in (1, 2, 3, 5)]
    assert found.memory_share == pytest.approx(sum(shares) / 4)


def test_the_rest_of_a_segment_is_lost_after_a_disagreement() -> None:
    found = summarize_forced(tokens()).acceptance
    assert found == Acceptance(drafted_tokens=4, agreed_tokens=3, kept_tokens=2)
    assert found.agreed_share == 0.75 and found.kept_share == 0.5


def test_uncertain_tokens_are_the_fast_ones_above_the_threshold() -> None:
    found = summarize_forced(tokens()).uncertainty
    assert found is not None and (found.above_nats, found.token_share) == (0.3, 0.5)
    assert found.kl_share == pytest.approx(0.5)


def test_verified_tokens_say_nothing_about_drafts() -> None:
    found = summarize_forced(tokens(verified=True))
    assert found.acceptance is None and found.uncertainty is None


def test_tokens_by_distance() -> None:
    found = summarize_forced(tokens()).by_distance
    assert [(group.label, group.tokens) for group in found] == [("0", 2), ("1", 2), ("2-3", 2)]
    assert [group.kl_mean_nats for group in found] == pytest.approx([0.0, 0.25, 0.25])
    assert [group.agreement for group in found] == [1.0, 1.0, 0.5]


def test_distances_cover_everything_once() -> None:
    bounds = list(DISTANCES)
    assert bounds[0][0] == 0 and bounds[-1][1] is None
    for (_, high), (low, _) in zip(bounds, bounds[1:], strict=False):
        assert high is not None and low == high + 1


def test_free_tokens() -> None:
    drafts = StepRecord(
        "slow", "verify", "", 5, 0, 1.0, 9, 7, 1, drafted_tokens=4, accepted_tokens=3
    )
    found = summarize_free(FreeTokens([5, 8, 6], [8, 8, 8], [False, True, False], [drafts] * 2))
    assert found.median_agreed_tokens == 6 and found.identical == 1
    assert found.slow_share == 1 and found.verified_acceptance == 0.75
    unverified = FreeTokens([5], [8], [False], tokens().records)
    assert summarize_free(unverified).verified_acceptance is None
