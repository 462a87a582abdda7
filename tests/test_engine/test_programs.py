"""Programs compute what eager steps compute: uncaptured, float32, token for token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.engine import history, memory
from sfi_agent.engine.programs import cohort_programs, seats
from tests.families import VOCABULARY
from tests.test_engine.program_cases import (
    Told,
    agree,
    counted_requests,
    eager_engine,
    fresh_program_engine,
    program_engine,
    program_policies,
    records_of,
    tell,
    told,
)
from tests.test_guarantees.adversaries import adversaries
from tests.test_guarantees.policies import (
    FAMILY_NAMES,
    LAYOUT_NAMES,
    for_each,
    prompts,
    turns_of_ids,
)

NEW_TOKENS = 9


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_turns_equal_eager_ones(family: str) -> None:
    """Kinds, reasons, sizes of memories and selections included."""
    whole = []

    def check(config: SessionConfig, turns: list[list[int]]) -> None:
        def act(session: Session) -> None:
            for turn in turns:
                session.decode(turn, max_new_tokens=NEW_TOKENS)

        expected = tell(eager_engine(family), config, act, logits=True)
        got = tell(program_engine(family), config, act, logits=False)
        whole.append(agree(expected, got, config))

    with adversaries(), counted_requests() as counts:
        for_each(family, 4, config=program_policies(), turns=turns_of_ids)(check)
    assert sum(whole) >= 3, "rounding decided too often"
    assert counts.total() > 20, counts


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_blocks_longer_than_a_chunk_equal_eager_ones(chunk: int) -> None:
    """The first part of a block is a program's, the others are not."""

    def check(config: SessionConfig, prompt: list[int]) -> None:
        config = config.replace(mode="slow_fast")

        def act(session: Session) -> None:
            session.decode(prompt, max_new_tokens=3 * NEW_TOKENS)

        expected = tell(eager_engine("gemma3", chunk), config, act, logits=True)
        got = tell(program_engine("gemma3", chunk), config, act, logits=False)
        agree(expected, got, config)

    with adversaries(), counted_requests() as counts:
        for_each(f"chunks {chunk}", 5, config=program_policies("verify"), prompt=prompts)(check)
    assert counts["BlockStep"] > 10, counts


def story(
    engine: Engine,
    config: SessionConfig,
    other: SessionConfig,
    turns: list[list[int]],
    cut: int,
    *,
    logits: bool,
) -> list[Told]:
    """A parent, a child under another policy and a grandchild; the parent is rewound."""
    with engine.session(config) as parent:
        found = [told(parent, logits=logits)]
        parent.decode(turns[0], max_new_tokens=NEW_TOKENS)
        with parent.fork(other) as child, child.fork(config) as grandchild:
            sessions = [parent, child, grandchild]
            found += [told(session, logits=logits) for session in sessions[1:]]
            # Both begin with a single pending token.
            child.decode([], max_new_tokens=NEW_TOKENS)
            grandchild.decode([], max_new_tokens=3)
            parent.rewind(parent.mark(1 + cut % (len(parent.token_ids) - 1)))
            parent.decode([], max_new_tokens=NEW_TOKENS)
            child.rewind(child.mark(len(turns[0]) + 2))
            for session, turn in zip(sessions, turns, strict=True):
                session.decode(turn, max_new_tokens=NEW_TOKENS)
            with grandchild.fork() as last:
                sessions.append(last)
                found.append(told(last, logits=logits))
                last.decode([], max_new_tokens=NEW_TOKENS)
                for one, session in zip(found, sessions, strict=True):
                    one.records = records_of(session)
    return found


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_forks_and_rewinds_equal_eager_ones(family: str) -> None:
    def check(
        config: SessionConfig, other: SessionConfig, turns: list[list[int]], cut: int
    ) -> None:
        expected = story(eager_engine(family), config, other, turns, cut, logits=True)
        got = story(program_engine(family), config, other, turns, cut, logits=False)
        policies = (config, other, config, config)
        # Where rounding lets a parent and its twin part, children are not compared.
        for one, two, policy in zip(expected, got, policies, strict=True):
            if not agree(one, two, policy):
                break

    with adversaries(), counted_requests() as counts:
        for_each(
            family,
            4,
            config=program_policies(),
            other=program_policies(),
            turns=st.lists(prompts, min_size=3, max_size=3),
            cut=st.integers(0, 1000),
        )(check)
    assert counts.total() > 30, counts


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
def test_given_tokens_are_followed_as_by_eager_steps(slow_step: str) -> None:
    def check(config: SessionConfig, prompt: list[int], given: list[int]) -> None:
        def act(session: Session) -> None:
            session.follow(given, prompt_ids=prompt)
            session.decode([], given_ids=given[:5], max_new_tokens=NEW_TOKENS)

        expected = tell(eager_engine("qwen3"), config, act, logits=True)
        got = tell(program_engine("qwen3"), config, act, logits=False)
        agree(expected, got, config)

    given_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
    with adversaries(), counted_requests() as counts:
        policies = program_policies(slow_step)
        for_each(slow_step, 5, config=policies, prompt=prompts, given=given_ids)(check)
    assert counts.total() > 30, counts


def test_histories_and_memories_that_move_and_outgrow_their_class_equal_eager_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Programs are made for a few tokens at a time, and every buffer grows by a few."""
    monkeypatch.setattr(cohort_programs, "_LEAST_CAPACITY", 16)
    monkeypatch.setattr(seats, "LARGEST_BLOCK", 24)
    monkeypatch.setattr(history, "MINIMUM_GROWTH_TOKENS", 5)
    monkeypatch.setattr(memory, "_ALLOCATION_STEP_TOKENS", 3)
    capacities: set[int] = set()

    def check(config: SessionConfig, turns: list[list[int]]) -> None:
        def act(session: Session) -> None:
            for turn in turns:
                session.decode(turn, max_new_tokens=3 * NEW_TOKENS)

        engine = fresh_program_engine("gemma3")
        expected = tell(eager_engine("gemma3"), config, act, logits=True)
        got = tell(engine, config, act, logits=False)
        agree(expected, got, config)
        programs: Any = engine.runner.programs
        capacities.update(made.capacity for made in programs._steps.seats._cohorts.values())

    with adversaries():
        for_each("growth", 8, config=program_policies(), turns=turns_of_ids)(check)
    assert len(capacities) >= 4, capacities
