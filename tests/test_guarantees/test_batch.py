"""Decoding many sessions together gives each of them what it gets alone, token for token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st

from sfi_agent import (
    ContextOverflowError,
    Engine,
    InputError,
    NothingPendingError,
    Session,
    SessionConfig,
    SessionStateError,
)
from sfi_agent.errors import SessionBusy
from tests.families import CONTEXT_TOKENS, VOCABULARY
from tests.test_engine.program_cases import (
    POLICY,
    Told,
    agree,
    counted_requests,
    eager_engine,
    program_engine,
    program_policies,
    records_of,
    told,
)
from tests.test_guarantees.adversaries import adversaries
from tests.test_guarantees.policies import LAYOUT_NAMES, for_each, prompts

PROMPTS = [list(range(20, 50)), list(range(9)), list(range(60, 100))]

ENGINES: dict[str, Callable[[str], Engine]] = {"eager": eager_engine, "programs": program_engine}
over_engines = pytest.mark.parametrize("steps", ENGINES)


@dataclass(frozen=True)
class Row:
    """One session of a batch: its policy, two turns and a limit."""

    config: SessionConfig
    turns: tuple[list[int], list[int]]
    limit: int


def rows_of(**options: Any) -> st.SearchStrategy[list[Row]]:
    """One to six sessions, whatever each of them does."""
    turns = st.tuples(prompts, st.one_of(prompts, st.just([0])))
    row = st.builds(Row, program_policies(**options), turns, st.integers(0, 12))
    return st.lists(row, min_size=1, max_size=6)


def played(
    engine: Engine, rows: Sequence[Row], stop_ids: Collection[int], *, batch: bool
) -> tuple[list[Told], list[list[int]]]:
    """Two turns of every row; what the sessions told and what was returned."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(row.config)) for row in rows]
        found = [told(session, logits=not batch, refreshes=True) for session in sessions]
        generated: list[list[int]] = []
        for turn in range(2):
            ids, limits = [row.turns[turn] for row in rows], [row.limit for row in rows]
            if batch:
                generated += engine.decode_batch(
                    sessions, ids, max_new_tokens=limits, stop_ids=stop_ids
                )
                continue
            for session, new, limit in zip(sessions, ids, limits, strict=True):
                generated.append(session.decode(new, max_new_tokens=limit, stop_ids=stop_ids))
        for one, session in zip(found, sessions, strict=True):
            one.records = records_of(session)
    return found, generated


@over_engines
@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_a_batch_equals_its_sessions_alone(family: str, steps: str) -> None:
    """Records, refreshes and selections included; every row has a policy of its own."""
    whole: list[bool] = []

    def check(rows: list[Row], stop_ids: set[int]) -> None:
        expected, alone = played(eager_engine(family), rows, stop_ids, batch=False)
        got, together = played(ENGINES[steps](family), rows, stop_ids, batch=True)
        same = [
            agree(one, other, row.config)
            for one, other, row in zip(expected, got, rows, strict=True)
        ]
        whole.extend(same)
        assert alone == together or not all(same)

    stops = st.sets(st.integers(0, VOCABULARY - 1), max_size=8)
    with adversaries(), counted_requests() as counts:
        for_each(family + steps, 3, rows=rows_of(), stop_ids=stops)(check)
    assert sum(whole) >= 0.8 * len(whole), "rounding decided too often"
    assert (counts.total() > 20) == (steps == "programs"), counts


@over_engines
@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
def test_sub_agents_of_one_parent_equal_themselves_alone(slow_step: str, steps: str) -> None:
    def forked(
        engine: Engine, configs: list[SessionConfig], turns: list[list[int]], *, batch: bool
    ) -> list[Told]:
        with ExitStack() as stack:
            parent = stack.enter_context(engine.session(configs[0]))
            found = [told(parent, logits=not batch, refreshes=True)]
            parent.decode(PROMPTS[0], max_new_tokens=5)
            sessions = [parent]
            for seed, config in enumerate(configs):
                sessions.append(stack.enter_context(parent.fork(config, seed=seed)))
                found.append(told(sessions[-1], logits=not batch, refreshes=True))
            if batch:
                engine.decode_batch(sessions, [[], *turns], max_new_tokens=12)
            else:
                for session, turn in zip(sessions, [[], *turns], strict=True):
                    session.decode(turn, max_new_tokens=12)
            for one, session in zip(found, sessions, strict=True):
                one.records = records_of(session)
        return found

    def check(configs: list[SessionConfig], turns: list[list[int]]) -> None:
        expected = forked(eager_engine("gemma3"), configs, turns, batch=False)
        got = forked(ENGINES[steps]("gemma3"), configs, turns, batch=True)
        if not agree(expected[0], got[0], configs[0]):
            return
        for seed, (one, other, config) in enumerate(
            zip(expected[1:], got[1:], configs, strict=True)
        ):
            agree(one, other, config.replace(sampling={"seed": seed}))

    policies = st.lists(program_policies(slow_step), min_size=3, max_size=3)
    news: st.SearchStrategy[list[int]] = st.one_of(prompts, st.just([]))
    with adversaries():
        for_each(
            slow_step + steps, 2, configs=policies, turns=st.lists(news, min_size=3, max_size=3)
        )(check)


def state_of(session: Session) -> tuple[Any, ...]:
    sequence = session._core._opened().sequence
    tokens = [layer.history.tokens for layer in sequence.layers]
    return session.token_ids, session.trace, session.messages, sequence.processed_tokens, tokens


Refusal = tuple[type[Exception], Callable[[Any, Any], Any]]
REFUSALS: dict[str, Refusal] = {
    "a session twice": (InputError, lambda e, s: e.decode_batch([s[0], s[1], s[0]])),
    "no session": (InputError, lambda e, s: e.decode_batch([s[0], 5])),
    "one alone": (InputError, lambda e, s: e.decode_batch(s[0])),
    "another model's": (InputError, lambda e, s: eager_engine("qwen2").decode_batch(s)),
    "ids for two": (InputError, lambda e, s: e.decode_batch(s, [[1], [2]])),
    "text": (InputError, lambda e, s: e.decode_batch(s, "abc")),
    "limits for two": (InputError, lambda e, s: e.decode_batch(s, max_new_tokens=[1, 2])),
    "a negative limit": (
        InputError,
        lambda e, s: e.decode_batch(s, [[1]] * 3, max_new_tokens=[3, 3, -1]),
    ),
    "an id that is none": (
        InputError,
        lambda e, s: e.decode_batch(s, [[1], [2], [VOCABULARY]], max_new_tokens=2),
    ),
    "a stop that is none": (
        InputError,
        lambda e, s: e.decode_batch(s, [[1], [2], [3]], stop_ids=["."]),
    ),
    "nothing pending": (
        NothingPendingError,
        lambda e, s: e.decode_batch([*s, e.session(POLICY)], max_new_tokens=2),
    ),
    "one too long": (
        ContextOverflowError,
        lambda e, s: e.decode_batch(s, max_new_tokens=[2, 2, CONTEXT_TOKENS]),
    ),
}


@over_engines
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_leaves_every_session_as_it_was(name: str, steps: str) -> None:
    kind, call = REFUSALS[name]
    engine = ENGINES[steps]("llama")
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(POLICY)) for _ in PROMPTS]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            session.decode(prompt, max_new_tokens=4)
        before = [state_of(session) for session in sessions]
        with pytest.raises(kind):
            call(engine, sessions)
        assert [state_of(session) for session in sessions] == before
        assert all(len(row) == 2 for row in engine.decode_batch(sessions, max_new_tokens=2))


def test_a_busy_or_closed_session_is_refused_and_the_others_stay_free() -> None:
    engine = eager_engine("llama")
    with engine.session(POLICY) as one, engine.session(POLICY) as other:
        one.decode([1, 2], max_new_tokens=1)
        with other._owner.held_for("send"), pytest.raises(SessionBusy):
            engine.decode_batch([one, other], [[1], [2]], max_new_tokens=2)
        assert len(one.token_ids) == 3 and other.token_ids == []
        other.close()
        with pytest.raises(SessionStateError):
            engine.decode_batch([one, other], [[1], [2]], max_new_tokens=2)
        assert len(one.decode([], max_new_tokens=2)) == 2
