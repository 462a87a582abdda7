"""Sessions that take turns in the slots of one cohort, and fast steps that are begun ahead."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any, Literal

import pytest
from hypothesis import strategies as st

from sfi_agent import Boundary, Engine, Session, SessionConfig, StepEvent, TokenEvent
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.programs.ahead import AheadSteps
from sfi_agent.engine.programs.program import StepProgram
from sfi_agent.engine.requests import StepOutcome
from sfi_agent.observe.trace import StepRecord
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin
from tests.test_engine.program_cases import (
    POLICY,
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
from tests.test_guarantees.policies import for_each, prompts

PROMPT = list(range(20, 50))
NEW_TOKENS = 16


def in_turns(
    engine: Engine, sessions: Sequence[Session], turns: Sequence[list[int]], lots: Sequence[int]
) -> None:
    """Decode on all of them, one request at a time, each in a cohort of any size.

    Threads that share an engine may do so, and batches that grow and shrink.
    """
    moves: dict[int, Any] = {}
    outcomes: dict[int, StepOutcome | None] = {}
    for index, (session, turn) in enumerate(zip(sessions, turns, strict=True)):
        session._core.append(turn, NEW_TOKENS)
        moves[index] = session._core.moves(DecodeLimits(NEW_TOKENS), [])
        outcomes[index] = None
    for lot in cycle(lots):
        if not moves:
            return
        index = sorted(moves)[lot % len(moves)]
        try:
            move = moves[index].send(outcomes[index])
        except StopIteration:
            del moves[index]
            continue
        asked = not isinstance(move, StepRecord)
        batch = 1 + lot % 5 // 2
        outcomes[index] = engine.runner.execute([move], batch)[0] if asked else None


def together(
    engine: Engine,
    configs: Sequence[SessionConfig],
    turns: Sequence[list[int]],
    lots: Sequence[int],
    *,
    logits: bool,
) -> list[Told]:
    """Two sessions and a fork of the first one, in turns if there are lots."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(config)) for config in configs[:2]]
        for session, turn in zip(sessions, turns, strict=False):
            session.decode(turn, max_new_tokens=3)
        sessions.append(stack.enter_context(sessions[0].fork(configs[2])))
        found = [told(session, logits=logits, refreshes=True) for session in sessions]
        nothing: list[list[int]] = [[], turns[2], []]
        if lots:
            in_turns(engine, sessions, nothing, lots)
        else:
            for session, turn in zip(sessions, nothing, strict=True):
                session.decode(turn, max_new_tokens=NEW_TOKENS)
        for one, session in zip(found, sessions, strict=True):
            one.records = records_of(session)
    return found


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sessions_that_take_turns_in_a_slot_do_not_disturb_each_other(
    family: str, slow_step: str
) -> None:
    """Slots are lost and taken back between any two requests, also between block and refresh."""

    def check(configs: list[SessionConfig], turns: list[list[int]], lots: list[int]) -> None:
        expected = together(eager_engine(family), configs, turns, [], logits=True)
        got = together(program_engine(family), configs, turns, lots, logits=False)
        for one, other, config in zip(expected, got, configs, strict=True):
            agree(one, other, config)

    same = st.lists(program_policies(slow_step), min_size=1, max_size=1).map(lambda one: one * 3)
    any_three = st.lists(program_policies(slow_step), min_size=3, max_size=3)
    with adversaries(), counted_requests() as counts:
        for_each(
            family + slow_step,
            3,
            configs=st.one_of(same, any_three),
            turns=st.lists(prompts, min_size=3, max_size=3),
            lots=st.lists(st.integers(0, 29), min_size=1, max_size=40),
        )(check)
    assert counts.total() > 60, counts


@contextmanager
def watched_ahead() -> Iterator[Counter[str]]:
    """Counts steps that were started, and those begun ahead that were taken."""
    counts: Counter[str] = Counter()
    run, take = StepProgram.run, AheadSteps.take

    def counting(program: StepProgram, steps: Any) -> Any:
        counts["started"] += 1
        return run(program, steps)

    def taking(ahead: AheadSteps, *arguments: Any) -> Any:
        found = take(ahead, *arguments)
        counts["taken"] += found is not None
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepProgram, "run", counting)
        patched.setattr(AheadSteps, "take", taking)
        yield counts


def decode_prompt(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=NEW_TOKENS)


def test_a_fast_step_begun_ahead_is_taken_when_it_comes() -> None:
    """Segments of six: five of each are begun while the one before is read."""
    engine = fresh_program_engine("gemma3")
    with watched_ahead() as counts:
        got = tell(engine, POLICY, decode_prompt, logits=False)
    kinds = [record.kind for record in got.records]
    assert kinds == ["slow", *["fast"] * 6, "slow", *["fast"] * 6, "slow", "fast"]
    assert counts == {"started": 15, "taken": 10}
    assert agree(tell(eager_engine("gemma3"), POLICY, decode_prompt, logits=True), got, POLICY)


class _Reports(FakeDetector):
    """Reports at some positions: "next" for tokens, "now" for steps."""

    def __init__(self, tokens: set[int], steps: set[int]) -> None:
        super().__init__(None)
        self.tokens, self.steps = tokens, steps

    def after_token(self, event: TokenEvent) -> Boundary | None:
        return Boundary("token") if event.position in self.tokens else None

    def after_step(self, event: StepEvent) -> Boundary | None:
        return Boundary("step", "now") if event.position in self.steps else None


@pytest.mark.parametrize(
    ("tokens", "steps", "lag", "left"),
    [
        ({34}, set(), 0, 1),
        ({34}, set(), 1, 0),
        (set(), {34}, 0, 1),
        (set(), {34}, 1, 1),
        ({33, 40}, {36}, 0, 3),
    ],
)
@pytest.mark.parametrize("slow_step", ["observe", "rectify"])
def test_a_step_begun_ahead_is_left_where_a_detector_says_otherwise(
    tokens: set[int],
    steps: set[int],
    lag: Literal[0, 1],
    left: int,
    slow_step: Literal["observe", "rectify"],
) -> None:
    """With a lag the step after a boundary still happens, so nothing was begun in vain."""
    plugin = detector_plugin("reports", FakeConfig, lambda config, _: _Reports(tokens, steps))
    with temporary_plugins(reports=plugin):
        config = POLICY.replace(
            boundaries=[{"name": "reports"}],
            slow_step=slow_step,
            refresh={"min_segment_tokens": 1, "max_segment_tokens": 40, "lag": lag},
        )
        with watched_ahead() as counts:
            got = tell(fresh_program_engine("gemma3"), config, decode_prompt, logits=False)
        expected = tell(eager_engine("gemma3"), config, decode_prompt, logits=True)
    assert agree(expected, got, config)
    kinds = Counter(record.kind for record in got.records)
    assert kinds["slow"] == 1 + len(tokens) and kinds["retry"] == len(steps)
    # What was taken was started a step earlier; what was left was started in vain.
    assert counts["started"] - left == NEW_TOKENS - 1 + len(steps)
    assert counts["taken"] > 5


def test_dense_steps_are_begun_ahead_and_outlive_a_stop() -> None:
    """The next decoding may take what the last one began, if nobody has come in between."""
    dense = SessionConfig(mode="dense")

    def act(engine: Engine) -> list[int]:
        with engine.session(dense) as session:
            drawn = session.decode(PROMPT, max_new_tokens=NEW_TOKENS, stop_ids=[stop])
            session.decode([], max_new_tokens=3, stop_ids=[])
            session.rewind(session.mark(len(PROMPT) + len(drawn)))
            return [*drawn, *session.decode([], max_new_tokens=5)]

    with eager_engine("llama").session(dense) as session:
        stop = session.decode(PROMPT, max_new_tokens=5)[-1]
    with watched_ahead() as counts:
        assert act(fresh_program_engine("llama")) == act(eager_engine("llama"))
    assert counts["taken"] > 5


@pytest.mark.parametrize("by", ["decode", "decode_batch"])
def test_a_dense_step_begun_for_another_past_is_not_taken(by: str) -> None:
    """Same session, position, token and sampler; the tokens before were replaced, unstepped."""
    dense = SessionConfig(mode="dense")

    def act(engine: Engine) -> list[int]:
        with engine.session(dense) as session:
            drawn = session.decode(PROMPT, max_new_tokens=NEW_TOKENS, stop_ids=[stop])
            length = len(session.token_ids)
            session.rewind(session.mark(3))
            others = [*range(60, 60 + length - 4), drawn[-1]]
            if by == "decode":
                session.decode(others, max_new_tokens=0)
            else:
                engine.decode_batch([session], [others], max_new_tokens=0)
            assert len(session.token_ids) == length
            return session.decode([], max_new_tokens=5)

    with eager_engine("llama").session(dense) as session:
        stop = session.decode(PROMPT, max_new_tokens=5)[-1]
    assert act(fresh_program_engine("llama")) == act(eager_engine("llama"))


def test_a_step_begun_for_another_memory_is_not_taken() -> None:
    """Same session, position, token and sampler; a batch refreshed its memory in between."""
    # So the dense step draws the token again that the fast step drew.
    everything = POLICY.replace(memory={"selected_tokens": 1000})

    def act(engine: Engine, prompt: list[int], pending: int) -> list[int]:
        with engine.session(everything) as session, engine.session(everything) as other:
            # Stopped where the next fast step was begun already.
            drawn = session.decode(prompt, max_new_tokens=NEW_TOKENS, stop_ids=[pending])
            session.rewind(session.mark(len(session.token_ids) - 1))
            # A dense step with the other session; then the first one is alone again.
            limits = [NEW_TOKENS, 1]
            again, _ = engine.decode_batch([session, other], [[], PROMPT], max_new_tokens=limits)
            return [*drawn, *again]

    programs, same = fresh_program_engine("llama"), 0
    for first in range(0, 60, 3):
        prompt = [first, *PROMPT]
        with programs.session(everything) as session:
            tokens = session.decode(prompt, max_new_tokens=5)
        pending = next((t for t in tokens[2:] if tokens.count(t) == 1), None)
        if pending is not None:
            place = tokens.index(pending)
            expected = act(eager_engine("llama"), prompt, pending)
            same += expected[place + 1] == pending
            assert act(programs, prompt, pending) == expected
    assert same >= 3


def test_a_parent_that_was_rewound_below_its_fork_steps_with_others() -> None:
    """Its next token begins an extent of its own, which the others do not have."""

    def act(engine: Engine) -> list[list[int]]:
        with ExitStack() as stack:
            other, parent = (stack.enter_context(engine.session(POLICY)) for _ in range(2))
            for session in (other, parent):
                session.decode(PROMPT, max_new_tokens=NEW_TOKENS)
            child = stack.enter_context(parent.fork())
            parent.rewind(parent.mark(len(PROMPT) - 5))
            engine.decode_batch([other, parent, child], max_new_tokens=NEW_TOKENS)
            return [session.token_ids for session in (other, parent, child)]

    assert act(fresh_program_engine("llama")) == act(eager_engine("llama"))


@pytest.mark.parametrize("slow_step", ["observe", "verify"])
def test_a_closed_session_frees_its_history_and_memory(
    slow_step: Literal["observe", "verify"],
) -> None:
    """Tables keep the buffers alive that they point at, and outlive sessions."""
    engine = program_engine("llama")
    config = POLICY.replace(slow_step=slow_step)
    with engine.session(config) as session:
        session.decode(PROMPT, max_new_tokens=NEW_TOKENS)
        layers = session._core._state.sequence.layers  # type: ignore[union-attr]
        buffers = [weakref.ref(layer.history.extents[0].buffer) for layer in layers]
        memories = [weakref.ref(layer.memory.keys) for layer in layers if layer.memory is not None]
        del layers
    del session
    gc.collect()
    assert memories and all(buffer() is None for buffer in (*buffers, *memories))
