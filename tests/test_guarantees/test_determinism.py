"""Guarantee 5: the same seed gives the same output, another seed gives another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sfi_agent import SessionConfig
from tests.families import tiny_engine
from tests.test_guarantees.play import play
from tests.test_guarantees.policies import LAYOUT_NAMES, for_each, sparse_policies, turns_of_ids

NEW_TOKENS = 8


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_the_same_policy_and_ids_give_the_same_bits(family: str) -> None:
    @for_each(family, 5, config=sparse_policies(), turns=turns_of_ids)
    def check(config: SessionConfig, turns: list[list[int]]) -> None:
        first = play(tiny_engine(family), config, turns, new_tokens=NEW_TOKENS)
        second = play(tiny_engine(family), config, turns, new_tokens=NEW_TOKENS)
        assert first.ids == second.ids
        assert [r.kind for r in first.trace] == [r.kind for r in second.trace]
        assert torch.equal(first.next_logits, second.next_logits)


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_another_seed_samples_something_else_and_changes_nothing_greedy(family: str) -> None:
    @for_each(
        family,
        3,
        config=sparse_policies(),
        seeds=st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=2, unique=True),
    )
    def check(config: SessionConfig, seeds: list[int]) -> None:
        def ids(sampling: dict[str, Any]) -> list[int]:
            policy = config.replace(sampling=sampling)
            return play(tiny_engine(family), policy, [[1, 2, 3]], new_tokens=24).ids

        hot = {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
        greedy = {"temperature": 0.0}
        assert ids({**hot, "seed": seeds[0]}) != ids({**hot, "seed": seeds[1]})
        assert ids({**greedy, "seed": seeds[0]}) == ids({**greedy, "seed": seeds[1]})


def test_sessions_that_take_turns_on_one_model_do_not_disturb_each_other() -> None:
    config = SessionConfig(
        boundaries=[{"name": "interval", "every_tokens": 3}],
        memory={"sink_tokens": 1, "selected_tokens": 4, "recent_tokens": 4},
        refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
        sampling={"temperature": 1.0, "seed": 4},
    )
    engine = tiny_engine("llama")
    prompts = [list(range(30)), list(range(50, 70))]
    alone = [play(engine, config, [prompt, [9], []], new_tokens=6).ids for prompt in prompts]
    with engine.session(config) as one, engine.session(config) as other:
        for turn in ([], [9], []):
            for session, prompt in zip((one, other), prompts, strict=True):
                session.decode(turn if session.token_ids else prompt, max_new_tokens=6)
        assert [one.token_ids, other.token_ids] == alone


def test_a_draw_belongs_to_its_position_not_to_what_was_drawn_before() -> None:
    """One turn of eight tokens equals eight turns of one, at full budget."""
    config = SessionConfig(
        boundaries=[{"name": "never"}], sampling={"temperature": 1.3, "seed": 11}
    )
    engine = tiny_engine("qwen2")
    at_once = play(engine, config, [[4, 5, 6]], new_tokens=8)
    one_by_one = play(engine, config, [[4, 5, 6], *[[]] * 7], new_tokens=1)
    assert at_once.ids == one_by_one.ids
