"""Rows of the table from made-up runs whose sums are known; small helpers of the details."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import SessionConfig
from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.evaluation.ablation.details import position_runs, spread
from sfi_agent.evaluation.ablation.policy import Policy
from sfi_agent.evaluation.ablation.table import COLUMNS, csv_rows, table_rows
from sfi_agent.evaluation.ablation.units import CaseKey, RunKey

POLICIES = [
    Policy("dense", SessionConfig(mode="dense")),
    Policy("small", SessionConfig(memory={"selected_tokens": 64}), None, "sentences"),
]


def turn(**keys: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "right": 1,
        "parts": 2,
        "exact": False,
        "generated_tokens": 10,
        "fast_tokens": 8,
        "slow_tokens": 2,
        "retry_tokens": 0,
        "dense_passes": 1,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "memory_tokens_mean": 100.0,
        "agreed_tokens": 4,
        "agreed": False,
        "seconds": 0.5,
        "reasons": {"prefill": 1, "punctuation: sentence start": 1},
    }
    return {**base, **keys}


def key(policy: str, case: int = 0, tokens: int = 700, seed: int = 0) -> RunKey:
    return RunKey(CaseKey("mt_kv", tokens, "dense_question", "own", seed, case), policy)


def done(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"status": "done", "turns": list(turns)}


FAILED: dict[str, Any] = {"status": "failed", "turns": [], "error": {"type": "X", "message": "y"}}


def test_sums_shares_and_intervals() -> None:
    runs = {
        key("small", 0): done(turn(), turn(right=2, exact=True, agreed=True, agreed_tokens=10)),
        key("small", 1, seed=1): done(
            turn(
                generated_tokens=30,
                fast_tokens=24,
                memory_tokens_mean=200.0,
                dense_passes=5,
                retry_tokens=3,
                drafted_tokens=20,
                accepted_tokens=15,
                reasons={"prefill": 1, "entropy": 3},
            )
        ),
        key("small", 2): FAILED,
    }
    (row,) = table_rows(POLICIES, runs)
    assert (row["policy"], row["cases"], row["seeds"], row["failed"]) == ("small", 2, 2, 1)
    assert (row["right"], row["parts"], row["share"]) == (4, 6, 4 / 6)
    assert (row["share_low"], row["share_high"]) == wilson_interval(4, 6)
    assert (row["answers_given"], row["exact"], row["exact_share"]) == (3, 1, 1 / 3)
    assert (row["exact_low"], row["exact_high"]) == wilson_interval(1, 3)
    assert row["slow_share"] == 7 / 50 and row["retries"] == 3
    assert row["acceptance"] == 15 / 20
    assert row["memory_tokens_mean"] == (100 * 8 + 100 * 8 + 200 * 24) / 40
    assert row["agreed_tokens_median"] == 4.0 and row["agreed_share"] == 1 / 3
    assert row["seconds_per_token"] == 1.5 / 50
    assert row["reasons"] == {"entropy": 3, "prefill": 3, "punctuation: sentence start": 2}
    assert row["selected_tokens"] == 64


def test_a_row_of_failures_has_no_numbers() -> None:
    (row,) = table_rows(POLICIES, {key("small"): FAILED})
    assert row["cases"] == 0 and row["failed"] == 1
    numbers = {name: row[name] for name in ("share", "slow_share", "right", "parts", "acceptance")}
    assert set(numbers.values()) == {None}


def test_dense_has_no_memory_and_no_budget() -> None:
    dense = turn(fast_tokens=0, memory_tokens_mean=None)
    (row,) = table_rows(POLICIES, {key("dense"): done(dense)})
    assert row["memory_tokens_mean"] is None and row["selected_tokens"] is None
    assert row["acceptance"] is None


def test_rows_keep_the_order_of_tasks_and_policies_whatever_the_order_of_runs() -> None:
    runs = {
        key(policy, tokens=tokens): done(turn())
        for tokens in (700, 1400)
        for policy in ("small", "dense")
    }
    rows = table_rows(POLICIES, runs)
    assert [(row["context_tokens"], row["policy"]) for row in rows] == [
        (700, "dense"),
        (700, "small"),
        (1400, "dense"),
        (1400, "small"),
    ]


def test_csv_rows_have_every_column_and_the_parts_of_the_policy() -> None:
    rows = table_rows(POLICIES, {key("small"): done(turn()), key("dense"): done(turn())})
    found = csv_rows(POLICIES, rows)
    assert all(tuple(row) == COLUMNS for row in found)
    assert found[1]["boundaries"] == "sentences" and found[1]["selector"] == "per_head"
    assert found[0]["boundaries"] is None and found[0]["mode"] == "dense"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 3), max_size=60))
def test_runs_of_positions_say_the_same_as_the_counts(counts: list[int]) -> None:
    runs = position_runs(counts)
    again = [0] * len(counts)
    end = -1
    for start, length, count in runs:
        assert start >= end and length >= 1 and count >= 1
        assert not (start == end and again[start - 1] == count), "two runs that are one"
        again[start : start + length] = [count] * length
        end = start + length
    assert again == counts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(0, 200), most=st.integers(1, 30))
def test_spread_keeps_the_ends_and_spreads_evenly(size: int, most: int) -> None:
    found = spread(range(size), most)
    assert len(found) == min(size, most) == len(set(found)) and found == sorted(found)
    if size and most > 1:
        assert found[0] == 0 and found[-1] == size - 1
        gaps = [after - before for before, after in zip(found, found[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_columns_are_distinct() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS)
    with pytest.raises(KeyError):
        csv_rows(POLICIES, [{"policy": "unknown"}])
