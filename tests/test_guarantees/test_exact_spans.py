"""Stretches that must be exact are what dense decoding chooses, under any policy around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import pytest
from hypothesis import strategies as st

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.requests import BlockStep, DenseStep, StepRequest
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.trace import StepRecord
from tests.families import VOCABULARY, tiny_engine
from tests.test_engine.program_cases import counted_requests, eager_engine, program_engine
from tests.test_engine.test_drafting import check_events
from tests.test_guarantees.adversaries import adversaries, watching_detectors
from tests.test_guarantees.pair import Planned, raising_at
from tests.test_guarantees.policies import (
    LAYOUT_NAMES,
    block_policies,
    chunk_sizes,
    dense_twin,
    for_each,
    prompts,
    samplings,
)
from tests.test_guarantees.spans import Spans, SpanWatch, check_spans, stretches, watch_with

PROMPT = [(7 * index * index + 3) % VOCABULARY for index in range(28)]
SPANS = Spans(frozenset(range(50)), frozenset(range(50, 60)))
SHORT: dict[str, Any] = {"min_segment_tokens": 2, "max_segment_tokens": 6}
OBSERVE = SessionConfig(
    boundaries=[{"name": "never"}],
    memory={"sink_tokens": 1, "selected_tokens": 6, "recent_tokens": 4},
    refresh=SHORT,
)
NOTHING = OBSERVE.replace(
    selector={"name": "window"},
    memory={"sink_tokens": 0, "selected_tokens": 0, "recent_tokens": 1},
)
"""Fast steps see next to nothing: hardly a draft stands."""
SlowStep: TypeAlias = Literal["observe", "rectify"]
SLOW_STEPS = pytest.mark.parametrize("slow_step", ["observe", "rectify"])
WARM = {"temperature": 0.9, "seed": 5}


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


_ids = st.integers(0, VOCABULARY - 1)
span_rules: st.SearchStrategy[Spans] = st.builds(
    Spans,
    opens=st.frozensets(_ids, min_size=15, max_size=40),
    closes=st.frozensets(_ids, min_size=2, max_size=12),
    restricted=st.booleans(),
)


def policies(slow_step: str) -> st.SearchStrategy[SessionConfig]:
    """Any policy over any detectors and selectors, hostile ones too."""
    if slow_step == "rectify":
        return block_policies(slow_step)
    shortest = st.integers(1, 6)
    refreshes = st.builds(
        lambda least, more: {"min_segment_tokens": least, "max_segment_tokens": least + more},
        shortest,
        st.integers(0, 8),
    )
    return refreshes.flatmap(lambda refresh: block_policies(slow_step, refresh=refresh))


@SLOW_STEPS
@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_any_policy(family: str, slow_step: str) -> None:
    compared = 0

    def check(config: SessionConfig, prompt: list[int], spans: Spans, chunk: int | None) -> None:
        nonlocal compared
        with tiny_engine(family, chunk).session(config) as session:
            watches = watch_with(session, spans, len(prompt))
            assert len(session.decode(prompt, max_new_tokens=16)) == 16
            assert watches[-1].told == session.token_ids[len(prompt) :]
            compared += check_spans(session, spans, len(prompt))

    strategies: dict[str, Any] = {
        "config": policies(slow_step),
        "prompt": prompts,
        "spans": span_rules,
        "chunk": chunk_sizes,
    }
    for_each(family + slow_step, 3, **strategies)(check)
    assert compared


@SLOW_STEPS
@pytest.mark.parametrize("sampling", [{}, WARM], ids=["greedy", "warm"])
def test_a_memory_that_holds_nothing(slow_step: SlowStep, sampling: dict[str, Any]) -> None:
    config = NOTHING.replace(slow_step=slow_step, sampling=sampling)
    rejected = 0
    for family, restricted in (("gemma3", False), ("qwen2", True), ("llama", False)):
        spans = replace(SPANS, restricted=restricted)
        with tiny_engine(family).session(config) as session:
            watch_with(session, spans, len(PROMPT))
            session.decode(PROMPT, max_new_tokens=30)
            assert check_spans(session, spans, len(PROMPT)) > 10
            rejected += sum(r.drafted_tokens - r.accepted_tokens for r in session.trace)
    assert rejected > 20


@pytest.mark.parametrize("family", LAYOUT_NAMES)
def test_restricted_tokens_equal_those_of_restricted_dense_decoding(family: str) -> None:
    """Under verify, where everything is exact."""
    found: list[list[int]] = []

    def check(config: SessionConfig, prompt: list[int], spans: Spans) -> None:
        spans = replace(spans, restricted=True, exact=False)
        for policy in (dense_twin(config), config):
            with tiny_engine(family).session(policy) as session:
                watch_with(session, spans, len(prompt))
                found.append(session.decode(prompt, max_new_tokens=20))
                check_spans(session, spans, len(prompt))

    for_each(family, 3, config=block_policies("verify"), prompt=prompts, spans=span_rules)(check)
    same = [one == other for one, other in zip(found[::2], found[1::2], strict=True)]
    assert sum(same) >= len(same) - 1, "rounding decided more than once"


def test_restrictions_alone_change_no_steps() -> None:
    """A watch that wants nothing exact leaves kinds and reasons to the policy."""
    spans = replace(SPANS, restricted=True, exact=False)
    with tiny_engine("qwen2").session(OBSERVE) as session:
        watch_with(session, spans, len(PROMPT))
        session.decode(PROMPT, max_new_tokens=40)
        assert {record.reason for record in session.trace} == {"prefill", "max_segment", ""}
        assert session.stats.acceptance is None
        for start, end in stretches(session.token_ids, len(PROMPT), spans):
            twin = SpanWatch(spans, len(PROMPT))
            for position in range(start, end):
                twin.start(session.token_ids[:position])
                allowed = twin.allowed()
                assert allowed is not None and bool(allowed[session.token_ids[position]])


# ---------------------------------------------------------------- what happens in the middle


_few_ids = st.lists(_ids, max_size=5)
_PLACES = ("after_step", "after_token", "snapshot", "restore", "fast", "block", "select", "dense")
_operations: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    st.tuples(st.just("turn"), _few_ids, st.integers(1, 12)),
    st.tuples(st.just("pieces"), st.lists(st.integers(1, 4), min_size=2, max_size=4)),
    st.tuples(st.just("stop"), _few_ids, st.sets(_ids, min_size=4, max_size=40)),
    st.tuples(st.just("given"), _few_ids, st.lists(_ids, min_size=1, max_size=6)),
    st.tuples(st.just("cancel"), _few_ids, st.integers(1, 16)),
    st.tuples(st.just("leave"), _few_ids, st.integers(0, 8)),
    st.tuples(st.just("raise"), _few_ids, st.sampled_from(_PLACES), st.integers(1, 8)),
    st.tuples(st.just("rewind"), st.integers(30, 99)),
)


@SLOW_STEPS
@pytest.mark.parametrize("family", ["gemma3", "qwen2", "mistral_sliding", "llama", "olmo3"])
def test_whatever_is_done_with_a_session(family: str, slow_step: str) -> None:
    """Limits, stops, given tokens, cancellations and failures inside stretches."""
    compared = 0

    def check(
        config: SessionConfig, prompt: list[int], spans: Spans, operations: list[tuple[Any, ...]]
    ) -> None:
        nonlocal compared
        with tiny_engine(family).session(config) as session:
            watch_with(session, spans, len(prompt))
            session.decode(prompt, max_new_tokens=5)
            chosen = set(range(len(prompt), len(prompt) + 5))
            for name, *arguments in [*operations, ("pieces", [3, 4])]:
                before = session.token_ids
                given = _OPERATIONS[name](session, *arguments)
                after = len(session.token_ids)
                chosen |= set(range(len(before) + given, after))
                chosen &= set(range(after))
                assert session.token_ids[: len(before)] == before[:after]
                _require_whole(session)
                compared += check_spans(
                    session, spans, len(prompt), set(range(len(prompt), after)) - chosen
                )

    for_each(
        family + slow_step,
        3,
        config=policies(slow_step),
        prompt=prompts,
        spans=span_rules,
        operations=st.lists(_operations, min_size=2, max_size=4),
    )(check)
    assert compared > 20


def _require_whole(session: Session) -> None:
    """Keys and values end where ids do, and every record stands where its token is."""
    ids, processed = session.token_ids, session._core.processed_tokens
    assert processed < len(ids)
    for layer in session._core._opened().sequence.layers:
        assert layer.history.tokens == processed
    assert all(ids[record.position] == record.token_id for record in session.trace)


def _turn(session: Session, ids: list[int], new_tokens: int) -> int:
    session.decode(ids, max_new_tokens=new_tokens)
    return len(ids)


def _pieces(session: Session, sizes: list[int]) -> int:
    for size in sizes:
        assert len(session.decode([], max_new_tokens=size)) == size
    return 0


def _stop(session: Session, ids: list[int], stop_ids: set[int]) -> int:
    got = session.decode(ids, max_new_tokens=12, stop_ids=stop_ids)
    assert not stop_ids & set(got[:-1])
    return len(ids)


def _given(session: Session, ids: list[int], given_ids: list[int]) -> int:
    got = session.decode(ids, max_new_tokens=6, given_ids=given_ids)
    assert len(got) == 6
    assert session.token_ids[-6 - len(given_ids) : -6] == given_ids
    return len(ids) + len(given_ids)


def _cancel(session: Session, ids: list[int], answers: int) -> int:
    asked = iter([False] * answers)
    core = session._core
    core.append(ids, 20)
    list(core.steps(DecodeLimits(20, cancelled=lambda: next(asked, True))))
    return len(ids)


def _leave(session: Session, ids: list[int], kept: int) -> int:
    core = session._core
    core.append(ids, 20)
    steps: Any = core.steps(DecodeLimits(20))
    for _ in range(kept):
        next(steps)
    steps.close()
    return len(ids)


def _raise(session: Session, ids: list[int], place: str, call: int) -> int:
    decoder: Any = session._core._decoder
    steps = decoder.steps
    owner = decoder.runner if place in ("fast", "block", "dense") else None
    owner = owner or (steps.selector if place == "select" else steps.monitor)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, place, raising_at(getattr(owner, place), call), raising=True)
        try:
            session.decode(ids, max_new_tokens=14)
        except Planned:
            pass
    return len(ids)


def _rewind(session: Session, percent: int) -> int:
    session.rewind(session.mark(max(1, len(session.token_ids) * percent // 100)))
    return 0


_OPERATIONS: dict[str, Callable[..., int]] = {
    "turn": _turn,
    "pieces": _pieces,
    "stop": _stop,
    "given": _given,
    "cancel": _cancel,
    "leave": _leave,
    "raise": _raise,
    "rewind": _rewind,
}


# ---------------------------------------------------------------- what is told of it


@SLOW_STEPS
def test_the_trace_names_the_stretch_and_counts_its_passes(slow_step: SlowStep) -> None:
    config = OBSERVE.replace(
        slow_step=slow_step, memory={"selected_tokens": 24}, sampling={"temperature": 1.5}
    )
    with tiny_engine("gemma3").session(config) as session, _passes() as passes:
        watch_with(session, SPANS, len(PROMPT))
        session.decode(PROMPT, max_new_tokens=100)
        trace, ids = session.trace, session.token_ids
        assert session.stats.dense_passes == len(passes)
        assert session.stats.slow_share == len(passes) / 100
    found = list(stretches(ids, len(PROMPT), SPANS))
    assert len(found) > 2
    by_position = {record.position: record for record in trace}
    for start, end in found:
        assert (by_position[start].kind, by_position[start].reason) == ("slow", "span")
        assert by_position[start].slow_step == slow_step
        inner = [by_position[position] for position in range(start + 1, end)]
        assert all(record.slow_step in (None, "verify") for record in inner)
        # The pass that a closing draft asked for may reject it.
        assert {record.reason for record in inner} <= {
            "",
            "max_segment",
            "span_end",
            "max_new_tokens",
        }
    ends = [record for record in trace if record.reason == "span_end"]
    stood = [record for record in ends if record.accepted_tokens == record.drafted_tokens]
    assert stood and all(ids[record.position - 1] in SPANS.closes for record in stood)
    assert any(record.accepted_tokens for record in trace)
    assert any(record.accepted_tokens < record.drafted_tokens for record in trace)


@contextmanager
def _passes() -> Iterator[list[StepRequest]]:
    """The requests that read the whole history, prefills not counted."""
    found: list[StepRequest] = []
    execute = Runner.execute

    def counting(runner: Runner, requests: Sequence[StepRequest], *rest: int) -> Any:
        for request in requests:
            slow = isinstance(request, DenseStep) and request.interrupted is None
            if slow or isinstance(request, BlockStep):
                found.append(request)
        return execute(runner, requests, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runner, "execute", counting)
        yield found


@SLOW_STEPS
def test_detectors_know_only_what_stands(slow_step: SlowStep) -> None:
    with watching_detectors() as built:
        config = OBSERVE.replace(slow_step=slow_step, boundaries=[{"name": "watching"}])
        with tiny_engine("gemma3").session(config) as session:
            watch_with(session, SPANS, len(PROMPT))
            for turn in range(4):
                before: list[StepRecord] = session.trace
                session.decode([5, 6] if turn else PROMPT, max_new_tokens=17)
                check_events(session, session.trace[len(before) :], built[0].events)
            acceptance = session.stats.acceptance
        assert built[0].restored and acceptance is not None and acceptance < 1.0


# ---------------------------------------------------------------- programs and batches


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "mistral_sliding"])
def test_programs_take_the_same_steps(family: str) -> None:
    """Captured steps draw what is allowed, and nothing that was begun ahead escapes that."""
    whole: list[bool] = []

    def check(sampling: dict[str, Any], spans: Spans, slow_step: SlowStep) -> None:
        config = OBSERVE.replace(slow_step=slow_step, sampling=sampling)
        found = []
        for make in (eager_engine, program_engine):
            with make(family).session(config) as session:
                watch_with(session, spans, len(PROMPT))
                session.decode(PROMPT, max_new_tokens=24)
                check_spans(session, spans, len(PROMPT))
                found.append([(r.token_id, r.kind, r.reason) for r in session.trace])
        whole.append(found[0] == found[1])

    with counted_requests() as counts:
        for_each(
            family,
            3,
            sampling=samplings,
            spans=st.builds(replace, span_rules, restricted=st.just(True)),
            slow_step=st.sampled_from(["observe", "rectify", "verify"]),
        )(check)
    assert sum(whole) >= len(whole) - 1, "rounding decided more than once"
    assert counts["FastStep"] > 20 and counts["BlockStep"] > 5, counts


@pytest.mark.parametrize("make", [eager_engine, program_engine], ids=["eager", "programs"])
def test_a_batch_equals_its_sessions_alone(make: Callable[[str], Engine]) -> None:
    engine = make("qwen2")
    rows = [
        (OBSERVE, SPANS, PROMPT),
        (OBSERVE.replace(slow_step="rectify"), replace(SPANS, restricted=True), PROMPT[:9]),
        (NOTHING.replace(sampling=WARM), replace(SPANS, restricted=True), PROMPT[3:]),
        (OBSERVE.replace(slow_step="verify"), SPANS, PROMPT[1:]),
        (OBSERVE.replace(mode="dense"), replace(SPANS, restricted=True), PROMPT[:20]),
    ]
    alone: list[list[int]] = []
    for config, spans, prompt in rows:
        with engine.session(config) as session:
            watch_with(session, spans, len(prompt))
            alone.append(session.decode(prompt, max_new_tokens=30))
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(config)) for config, _, _ in rows]
        for session, (_, spans, prompt) in zip(sessions, rows, strict=True):
            watch_with(session, spans, len(prompt))
        prompts_of_rows = [prompt for _, _, prompt in rows]
        together = engine.decode_batch(sessions, prompts_of_rows, max_new_tokens=30)
        for session, (config, spans, prompt) in zip(sessions, rows, strict=True):
            if config.mode == "slow_fast":
                check_spans(session, spans, len(prompt))
    assert together == alone
