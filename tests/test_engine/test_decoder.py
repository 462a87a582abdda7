"""The decoder's state machine: who is asked when, retries, deferral, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sfi_agent import Boundary, SessionConfig, StepEvent, TokenEvent
from sfi_agent.engine.decoding_state import DecodeLimits
from sfi_agent.engine.sampling import entropy_nats
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin
from tests.families import tiny_engine
from tests.test_guarantees.play import Played, play

PROMPT = list(range(20, 50))
Report = Callable[[Any], Boundary | None]


class Watcher(FakeDetector):
    """Notes every call and reports what a test wants at an event."""

    def __init__(self, report: Report, needs: frozenset[str]) -> None:
        super().__init__(None)
        self.report = report
        self.needs = needs
        self.calls: list[Any] = []

    def reset(self, prompt_ids: Any, prompt_text: str) -> None:
        self.calls.append(("reset", list(prompt_ids), prompt_text))

    def after_step(self, event: StepEvent) -> Boundary | None:
        self.calls.append(event)
        return self.report(event)

    def after_token(self, event: TokenEvent) -> Boundary | None:
        self.calls.append(event)
        return self.report(event)


def nothing(event: Any) -> None:
    return None


def watch(
    report: Report = nothing,
    *,
    turns: Any = (PROMPT,),
    new_tokens: int = 9,
    needs: frozenset[str] = frozenset(),
    minimum: int = 1,
    maximum: int = 50,
    family: str = "llama",
    **options: Any,
) -> tuple[Watcher, Played]:
    watcher = Watcher(report, needs)
    plugin = detector_plugin("watcher", FakeConfig, lambda config, tokenizer: watcher)
    with temporary_plugins(watcher=plugin):
        config = SessionConfig(
            boundaries=[{"name": "watcher"}],
            memory={"sink_tokens": 1, "selected_tokens": 4, "recent_tokens": 4},
            refresh={"min_segment_tokens": minimum, "max_segment_tokens": maximum},
            **options,
        )
        played = play(tiny_engine(family), config, turns, new_tokens=new_tokens)
    return watcher, played


def kinds(played: Played) -> list[str]:
    return [record.kind for record in played.trace]


def test_detectors_see_every_token_before_the_step_that_processes_it() -> None:
    watcher, played = watch(turns=(PROMPT, [5]), new_tokens=3)
    ids = played.ids
    assert watcher.calls == [
        ("reset", PROMPT, ""),
        TokenEvent(ids[30], 30),
        StepEvent(30),
        TokenEvent(ids[31], 31),
        StepEvent(31),
        # The last token of a turn is shown with the next turn's prompt.
        ("reset", [ids[32], 5], ""),
        TokenEvent(ids[34], 34),
        StepEvent(34),
        TokenEvent(ids[35], 35),
        StepEvent(35),
    ]


def test_slow_steps_are_not_shown_as_steps() -> None:
    def every_third(event: Any) -> Boundary | None:
        due = isinstance(event, TokenEvent) and event.position % 3 == 0
        return Boundary("third") if due else None

    watcher, played = watch(every_third)
    steps = [event.position for event in watcher.calls if isinstance(event, StepEvent)]
    slow = [record.position - 1 for record in played.trace if record.kind == "slow"]
    assert sorted([*steps, *slow]) == list(range(29, 38))
    # The report at 30 comes right after the prefill and waits for one fast token.
    assert slow == [29, 31, 33, 36]
    assert [r.reason for r in played.trace if r.kind == "slow"][1:] == ["watcher: third"] * 3


def test_now_runs_the_same_token_again_whatever_the_minimum() -> None:
    def always(event: Any) -> Boundary | None:
        return Boundary("unsure", when="now") if isinstance(event, StepEvent) else None

    watcher, played = watch(always, minimum=20)
    assert kinds(played) == ["slow", *["retry"] * 8]
    assert {r.reason for r in played.trace[1:]} == {"watcher: unsure"}
    assert {r.slow_step for r in played.trace} == {"observe"}
    # Every token was processed densely in the end, so this equals dense decoding.
    dense = play(tiny_engine("llama"), SessionConfig(mode="dense"), [PROMPT], new_tokens=9)
    assert played.ids == dense.ids
    assert [refresh.tokens for refresh in played.refreshes] == list(range(30, 39))
    assert sum(isinstance(event, TokenEvent) for event in watcher.calls) == 8


def test_a_retry_restarts_the_segment_and_clears_what_was_deferred() -> None:
    def report(event: Any) -> Boundary | None:
        if isinstance(event, TokenEvent) and event.position == 30:
            return Boundary("too early")
        if isinstance(event, StepEvent) and event.position == 32:
            return Boundary("now", when="now")
        return None

    _, played = watch(report, minimum=4)
    assert kinds(played) == ["slow", "fast", "fast", "retry", *["fast"] * 5]
    assert [r.segment_tokens for r in played.trace] == [0, 1, 2, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("moment", [TokenEvent, StepEvent])
def test_a_boundary_inside_the_minimum_waits(moment: type[Any]) -> None:
    def report(event: Any) -> Boundary | None:
        due = isinstance(event, moment) and event.position == 30
        return Boundary("early") if due else None

    _, played = watch(report, minimum=3)
    assert kinds(played) == ["slow", "fast", "fast", "fast", "slow", *["fast"] * 4]


def test_segments_end_at_the_maximum() -> None:
    _, played = watch(maximum=2)
    assert kinds(played) == ["slow", *["fast", "fast", "slow"] * 2, "fast", "fast"]
    assert [r.reason for r in played.trace if r.kind == "slow"][1:] == ["max_segment"] * 2


def test_what_nobody_needs_is_not_computed() -> None:
    watcher, _ = watch()
    for event in watcher.calls[1:]:
        assert event.entropy_nats is None
        assert getattr(event, "selected_mass", None) is None
        assert getattr(event, "text", "") == ""


def test_what_is_needed_is_right() -> None:
    needs = frozenset({"entropy", "attention_drift", "text"})
    watcher, played = watch(needs=needs, sampling={"temperature": 2.0, "top_k": 3})
    tokenizer = tiny_engine("llama").tokenizer
    assert tokenizer is not None
    for event in watcher.calls[1:]:
        # The entropy is that of the whole distribution at temperature 1, before any filter.
        row = event.position if isinstance(event, StepEvent) else event.position - 1
        expected = float(entropy_nats(played.row_logits[row]))
        assert event.entropy_nats == pytest.approx(expected, abs=1e-5)
        if isinstance(event, StepEvent):
            assert event.selected_mass is not None and 0.0 < event.selected_mass < 1.0
        else:
            assert event.text == tokenizer.decode([event.token_id])
    assert watcher.calls[0] == ("reset", PROMPT, tokenizer.decode(PROMPT))


def test_a_model_without_sparse_layers_has_no_selected_mass() -> None:
    needs = frozenset({"attention_drift"})
    watcher, _ = watch(needs=needs, family="mistral_sliding")
    steps = [event for event in watcher.calls if isinstance(event, StepEvent)]
    assert steps and all(event.selected_mass is None for event in steps)


def test_mode_dense_asks_no_detector() -> None:
    watcher, played = watch(mode="dense")
    assert watcher.calls == []
    assert kinds(played) == ["slow"] * 9
    assert played.refreshes == []


def test_a_caller_that_stops_listening_leaves_a_consistent_session() -> None:
    engine = tiny_engine("llama")
    config = SessionConfig(boundaries=[{"name": "never"}], memory={"recent_tokens": 4})
    with engine.session(config) as session, engine.session(config) as twin:
        core: Any = session._core
        core.append(PROMPT, 20)
        steps: Iterator[Any] = core.steps(DecodeLimits(20))
        for _ in range(6):
            next(steps)
        assert core.processed_tokens == len(PROMPT) + 5
        steps.close()  # type: ignore[attr-defined]
        assert len(session.token_ids) == len(PROMPT) + 6 == len(session.trace) + len(PROMPT)
        twin.decode(PROMPT, max_new_tokens=6)
        assert session.token_ids == twin.token_ids
        assert torch.equal(session.next_logits(), twin.next_logits())
        assert session.decode([], max_new_tokens=5) == twin.decode([], max_new_tokens=5)
