"""Guarantees 1 (full budget equals dense) and 2 (a turn on a persistent history equals recompute).

Both in float32: logits within 1e-4 of the largest one; tokens identical, except where the draw led
by less than that (`play.same_tokens`).
"""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import SessionConfig
from tests.families import FAMILIES, tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.play import Played, close, play, same_tokens
from tests.test_guarantees.policies import (
    FAMILY_NAMES,
    FILLING_SELECTORS,
    chunk_sizes,
    for_each,
    samplings,
    sparse_policies,
    turns_of_ids,
)

NEW_TOKENS = 7


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_full_budget_equals_dense(family: str) -> None:
    policies = sparse_policies(full_budget=True)

    @for_each(family, 3, config=policies, turns=turns_of_ids, chunk=chunk_sizes)
    def check(config: SessionConfig, turns: list[list[int]], chunk: int | None) -> None:
        engine = tiny_engine(family, chunk)
        dense_config = config.replace(mode="dense")
        sparse = play(engine, config, turns, new_tokens=NEW_TOKENS)
        dense = play(engine, dense_config, turns, new_tokens=NEW_TOKENS)
        check_rows(family, sparse)
        if same_tokens(dense, sparse, config):
            assert close(sparse.next_logits, dense.next_logits)


@pytest.mark.parametrize("selector", FILLING_SELECTORS, ids=str)
def test_every_selector_that_fills_its_budget_equals_dense(selector: dict[str, Any]) -> None:
    """Fast steps mostly: one segment over 30 tokens, on grouped and multi-head attention."""
    config = SessionConfig(
        boundaries=[{"name": "never"}],
        selector=selector,
        memory={"sink_tokens": 2, "selected_tokens": 100, "recent_tokens": 3},
    )
    for family in ("qwen3", "llama_multi_head"):
        played = play(tiny_engine(family), config, [list(range(50))], new_tokens=30)
        assert sum(record.kind == "fast" for record in played.trace) == 29
        check_rows(family, played)


def check_rows(family: str, played: Played) -> None:
    """Every step of the session computed what a dense forward over all ids computes."""
    expected = dense_logits(tiny_engine(family).model, played.ids)
    for row, logits in played.row_logits.items():
        assert close(logits, expected[row]), f"row {row}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_late_turn_in_mode_dense_equals_a_fresh_recompute(family: str) -> None:
    @for_each(family, 2, sampling=samplings, turns=turns_of_ids, chunk=chunk_sizes)
    def check(sampling: dict[str, Any], turns: list[list[int]], chunk: int | None) -> None:
        config = SessionConfig(mode="dense", sampling=sampling)
        check_turns(family, config, turns, chunk)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_late_turn_at_full_budget_equals_a_fresh_recompute(family: str) -> None:
    policies = sparse_policies(full_budget=True)

    @for_each(family, 2, config=policies, turns=turns_of_ids, chunk=chunk_sizes)
    def check(config: SessionConfig, turns: list[list[int]], chunk: int | None) -> None:
        check_turns(family, config, turns, chunk)


def check_turns(
    family: str, config: SessionConfig, turns: list[list[int]], chunk: int | None
) -> None:
    """The last turn on the persistent history against a new session given all ids at once."""
    kept = play(tiny_engine(family, chunk), config, turns, new_tokens=NEW_TOKENS)
    split = len(kept.ids) - len(kept.generated[-1])
    fresh = play(tiny_engine(family), config, [kept.ids[:split]], new_tokens=NEW_TOKENS)
    kept.trace = kept.trace[-len(kept.generated[-1]) :]
    if same_tokens(fresh, kept, config):
        assert kept.generated[-1] == fresh.generated[-1]
        assert close(kept.next_logits, fresh.next_logits)
    assert close(kept.next_logits, dense_logits(tiny_engine(family).model, kept.ids)[-1])


def test_the_pad_token_inside_a_prompt_is_a_token_like_any_other() -> None:
    family = next(family for family in FAMILIES if family.name == "phi3")
    assert family.options["pad_token_id"] == 0
    config = SessionConfig(boundaries=[{"name": "never"}])
    played = play(tiny_engine("phi3"), config, [[5, 0, 0, 7, 0]], new_tokens=5)
    check_rows("phi3", played)
