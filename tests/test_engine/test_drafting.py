"""Drafts under verify: what detectors, selectors, records and statistics learn of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
from torch import Tensor

from sfi_agent import Session, SessionConfig, StepEvent, TokenEvent
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.runner import Runner, StepOutput
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.observe.trace import StepRecord
from sfi_agent.plugins import build_detector
from sfi_agent.session.output.text_stream import TextStream
from tests.families import VOCABULARY, tiny_engine
from tests.test_guarantees.adversaries import WatchingDetector, watching_detectors
from tests.test_guarantees.play import Played, record_into

PROMPT = [(7 * index * index + 3) % VOCABULARY for index in range(40)]
BUILT_IN: tuple[dict[str, Any], ...] = (
    {"name": "punctuation"},
    {"name": "structure"},
    {"name": "interval", "every_tokens": 5},
    {"name": "random", "probability": 0.1, "seed": 5},
    {"name": "entropy", "threshold_sigmas": 2.5, "when": "now"},
    {"name": "drift", "minimum_mass": 0.01},
)
VERIFY = SessionConfig(
    slow_step="verify",
    boundaries=[{"name": "never"}],
    memory={"sink_tokens": 1, "selected_tokens": 24, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
)
MIXED = pytest.mark.parametrize(
    ("family", "temperature"), [("gemma3", 0.0), ("gemma3", 1.0), ("olmo3", 0.7), ("qwen2", 0.0)]
)
"""Families on which some drafts stand and some do not."""


def detectors_of(session: Session) -> dict[str, Any]:
    monitor: Any = session._core._decoder.steps.monitor
    return dict(monitor._detectors)


def fed_again(entry: dict[str, Any], events: Sequence[Any]) -> Any:
    """A fresh detector that is told these events and nothing else."""
    detector = build_detector(entry, tiny_engine("llama").tokenizer)
    (_, prompt_ids, prompt_text), *others = events
    detector.reset(list(prompt_ids), prompt_text)
    for event in others:
        if isinstance(event, StepEvent):
            detector.after_step(event)
        else:
            detector.after_token(event)
    return detector


@MIXED
def test_detectors_know_only_what_stands(family: str, temperature: float) -> None:
    """Their states equal those of fresh detectors that never saw a rejected draft."""
    engine = tiny_engine(family)
    with watching_detectors() as built:
        config = VERIFY.replace(
            boundaries=[{"name": "watching"}, *BUILT_IN], sampling={"temperature": temperature}
        )
        with engine.session(config) as session:
            for _ in range(6):
                before = len(session.trace)
                new = PROMPT if not session.token_ids else [5, 6]
                session.decode(new, max_new_tokens=11)
                events = built[0].events
                check_events(session, session.trace[before:], events)
                for entry in BUILT_IN:
                    twin = fed_again(entry, events)
                    actual = detectors_of(session)[entry["name"]]
                    assert actual.snapshot() == twin.snapshot(), entry["name"]
            rejected = session.stats.acceptance
        assert built[0].restored and rejected is not None and 0.0 < rejected < 1.0


def check_events(session: Session, trace: list[StepRecord], events: Sequence[Any]) -> None:
    """Every kept token but the last was shown once, and between them the steps that drew them."""
    tokens = [event for event in events[1:] if isinstance(event, TokenEvent)]
    first = trace[0].position
    assert [event.position for event in tokens] == list(range(first, first + len(tokens)))
    assert len(tokens) == len(trace) - 1
    ids = session.token_ids
    assert all(ids[event.position] == event.token_id for event in tokens)
    stream = TextStream(session.engine.tokenizer)  # type: ignore[arg-type]
    text = stream.push_all(events[0][1])
    assert text == events[0][2]
    assert [event.text for event in tokens] == [stream.push(event.token_id) for event in tokens]
    by_position = {record.position: record for record in trace}
    for before, event, after in zip(events[:-1], events[1:], [*events[2:], None], strict=True):
        if isinstance(event, StepEvent):
            assert isinstance(before, TokenEvent) and before.position == event.position
            record = by_position[event.position + 1]
            assert record.kind == "fast" or record.kind == "retry"
            if record.kind == "retry":
                assert record.accepted_tokens == record.drafted_tokens
            elif after is not None:
                assert after.position == event.position + 1
                assert after.entropy_nats == event.entropy_nats
    fast = {record.position - 1 for record in trace if record.kind == "fast"}
    shown = {event.position for event in events if isinstance(event, StepEvent)}
    assert fast - {trace[-1].position - 1} <= shown


class _CountingRunner(Runner):
    """Counts passes over the history that are not prefills."""

    def __init__(self, inner: Runner) -> None:
        super().__init__(inner.model, inner.shape, inner.prefill_chunk_tokens, execution="eager")
        self.dense_passes = 0
        self.blocks: list[list[int]] = []
        self.fast_ids: list[int] = []

    def dense(
        self, sequence: SequenceState, ids: Sequence[int], **options: Any
    ) -> StepOutput | None:
        self.dense_passes += 1
        return super().dense(sequence, ids, **options)

    def block(self, sequence: SequenceState, ids: Sequence[int]) -> Tensor:
        self.blocks.append(list(ids))
        return super().block(sequence, ids)

    def fast(self, sequence: SequenceState, token: Tensor | int, **options: Any) -> StepOutput:
        self.fast_ids.append(int(token))
        return super().fast(sequence, token, **options)


def counting(session: Session) -> _CountingRunner:
    decoder: Any = session._core._decoder
    runner = _CountingRunner(decoder.runner)
    decoder.runner = runner
    return runner


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify", "dense"])
@pytest.mark.parametrize("boundaries", [[], [{"name": "entropy", "threshold_nats": 2.0}]])
def test_statistics_count_the_passes_that_were_made(
    slow_step: str, boundaries: list[dict[str, Any]]
) -> None:
    changes: dict[str, Any] = {"slow_step": slow_step}
    if slow_step == "dense":
        changes = {"mode": "dense"}
    config = VERIFY.replace(boundaries=boundaries, **changes)
    with tiny_engine("gemma3").session(config) as session:
        runner = counting(session)
        turns: list[tuple[list[int], int]] = [(PROMPT, 15), ([3], 1), ([], 8), ([4, 5], 12)]
        for ids, new_tokens in turns:
            session.decode(ids, max_new_tokens=new_tokens)
        stats, trace = session.stats, session.trace
    passes = runner.dense_passes - len(turns) + len(runner.blocks)
    assert stats.dense_passes == passes == sum(record.dense_passes for record in trace)
    assert stats.generated_tokens == 36
    assert stats.slow_share == passes / 36
    assert stats.fast_tokens + stats.slow_tokens + stats.retry_tokens == 36
    if slow_step == "verify":
        drafted = sum(record.drafted_tokens for record in trace)
        accepted = sum(record.accepted_tokens for record in trace)
        assert accepted == stats.fast_tokens
        # A retry throws its fast step away.
        assert drafted == len(runner.fast_ids) - stats.retry_tokens
        assert stats.acceptance == accepted / drafted
        assert 0 < accepted <= drafted
        assert bool(boundaries) or accepted < drafted
    else:
        assert stats.acceptance is None
        assert not any(record.drafted_tokens or record.accepted_tokens for record in trace)


@MIXED
def test_records_tell_what_became_of_each_segment(family: str, temperature: float) -> None:
    config = VERIFY.replace(
        boundaries=[{"name": "interval", "every_tokens": 4}], sampling={"temperature": temperature}
    )
    with tiny_engine(family).session(config) as session:
        session.decode(PROMPT, max_new_tokens=40)
        trace = session.trace
    assert trace[0].reason == "prefill" and trace[0].dense_passes == 0
    segment: list[StepRecord] = []
    for record in trace[1:]:
        segment.append(record)
        assert (record.kind == "fast") == (record.slow_step is None) == (record.reason == "")
        assert [item.segment_tokens for item in segment if item.kind == "fast"] == list(
            range(1, sum(item.kind == "fast" for item in segment) + 1)
        )
        if record.dense_passes:
            stood = sum(item.kind == "fast" for item in segment)
            assert (record.accepted_tokens, record.dense_passes) == (stood, 1)
            assert record.drafted_tokens >= stood and record.drafted_tokens <= 6
            segment = []
    assert not segment
    assert all(one.position + 1 == other.position for one, other in pairwise(trace))


def test_a_drafted_stop_that_dense_does_not_choose_ends_nothing() -> None:
    engine = tiny_engine("gemma3")
    with engine.session(VERIFY.replace(mode="dense")) as session:
        whole = session.decode(PROMPT, max_new_tokens=20)
    with engine.session(VERIFY) as session:
        runner = counting(session)
        assert session.decode(PROMPT, max_new_tokens=20) == whole
    wrong = set(runner.fast_ids) - set(whole)
    assert len(wrong) > 3
    false_stops = 0
    for stop in (*wrong, *whole[5::5]):
        with engine.session(VERIFY) as session:
            got = session.decode(PROMPT, max_new_tokens=20, stop_ids={stop})
            assert got == whole[: whole.index(stop) + 1 if stop in whole else 20]
            records = [record for record in session.trace if record.reason == "stop_id"]
            false_stops += any(r.accepted_tokens < r.drafted_tokens for r in records)
    assert false_stops > 2


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
@pytest.mark.parametrize("slow_step", ["rectify", "verify"])
def test_evidence_does_not_depend_on_how_a_block_is_cut(
    slow_step: Literal["rectify", "verify"], chunk: int | None
) -> None:
    """Where every draft stands the selector sees `evidence_queries` rows, in chunks too."""
    config = VERIFY.replace(
        slow_step=slow_step,
        memory={"selected_tokens": 1000},
        refresh={"min_segment_tokens": 6, "max_segment_tokens": 6, "evidence_queries": 4},
    )
    played = Played()
    with tiny_engine("llama", chunk).session(config) as session:
        record_into(played, session, look=False)
        session.decode(PROMPT, max_new_tokens=15)
        assert session.stats.dense_passes == 2
    rows = [evidence.logits.shape[2] for _, evidence in played.evidences]
    group, layers = 2, 3
    assert rows == [16 * group] * layers + [4 * group] * 2 * layers


@MIXED
def test_nobody_ever_sees_a_rejected_draft(family: str, temperature: float) -> None:
    """Between two records ids and trace hold what was told, and no more."""
    config = VERIFY.replace(sampling={"temperature": temperature})
    with tiny_engine(family).session(config) as session:
        core, told = session._core, list(PROMPT)
        core.append(PROMPT, 20)
        for record in core.steps(DecodeLimits(20)):
            told.append(record.token_id)
            assert core.ids == told
            assert core.trace[-1] == record and len(core.trace) == len(told) - len(PROMPT)
        assert (session.stats.acceptance or 0.0) < 1.0


def test_watching_detectors_notice_what_they_are_meant_to_notice() -> None:
    """A detector that keeps rejected drafts would fail the tests above."""
    detector = WatchingDetector(None)
    detector.reset([1], "a")
    detector.after_token(TokenEvent(3, 1))
    state = detector.snapshot()
    detector.after_step(StepEvent(1))
    assert detector.events != list(state)
    detector.restore(state)
    assert detector.events == list(state)
