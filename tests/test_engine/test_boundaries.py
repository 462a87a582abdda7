"""The monitor: who is asked, what outranks what, names of reasons, snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sfi_agent import Boundary, PluginError, StepEvent, TokenEvent
from sfi_agent.engine.boundaries import BoundaryMonitor


class Scripted:
    """Reports what it is told to; notes what it is shown. Its state is the number of events."""

    def __init__(
        self,
        step: Boundary | None = None,
        token: Boundary | None = None,
        needs: frozenset[str] = frozenset(),
    ) -> None:
        self.step = step
        self.token = token
        self.needs = needs
        self.seen: list[Any] = []

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        self.seen = [(list(prompt_ids), prompt_text)]

    def after_step(self, event: StepEvent) -> Boundary | None:
        self.seen.append(event)
        return self.step

    def after_token(self, event: TokenEvent) -> Boundary | None:
        self.seen.append(event)
        return self.token

    def snapshot(self) -> tuple[Any, ...]:
        return tuple(self.seen)

    def restore(self, state: tuple[Any, ...]) -> None:
        self.seen = list(state)


class Letters:
    """Running text for ids that are letters; two ids make a character from 100 on."""

    def __init__(self) -> None:
        self.half = ""

    def start(self, prompt_ids: Sequence[int]) -> str:
        self.half = ""
        return "".join(self.feed(token) for token in prompt_ids)

    def feed(self, token_id: int) -> str:
        if token_id < 100:
            return chr(64 + token_id)
        if not self.half:
            self.half = "half"
            return ""
        self.half = ""
        return "ä"

    def snapshot(self) -> str:
        return self.half

    def restore(self, state: str) -> None:
        self.half = state


def test_now_outranks_next_whatever_the_order() -> None:
    now, later = Boundary("a: now", when="now"), Boundary("b: next")
    for reports in ([now, later], [later, now]):
        monitor = BoundaryMonitor([(str(i), Scripted(step=r)) for i, r in enumerate(reports)], None)
        found = monitor.after_step(StepEvent(5))
        assert found is not None and found.when == "now"


def test_the_first_of_equals_gives_the_reason() -> None:
    for when in ("now", "next"):
        reports = [Boundary("first", when=when), Boundary("second", when=when)]
        monitor = BoundaryMonitor([("x", Scripted(step=r)) for r in reports], None)
        assert monitor.after_step(StepEvent(5)) == Boundary("x: first", when=when)
    reports = [Boundary("first"), Boundary("second")]
    monitor = BoundaryMonitor([("x", Scripted(token=r)) for r in reports], None)
    assert monitor.after_token(3, 5, None) == Boundary("x: first")


def test_every_detector_sees_every_event_whoever_reports() -> None:
    detectors = [Scripted(Boundary("a", "now"), Boundary("a")), Scripted(), Scripted()]
    monitor = BoundaryMonitor([(str(i), d) for i, d in enumerate(detectors)], None)
    monitor.reset([1, 2])
    monitor.after_step(StepEvent(2, 0.5, 0.25))
    monitor.after_token(9, 3, 0.5)
    expected = [([1, 2], ""), StepEvent(2, 0.5, 0.25), TokenEvent(9, 3, "", 0.5)]
    assert all(detector.seen == expected for detector in detectors)


@pytest.mark.parametrize(
    ("reason", "named"),
    [
        ("punctuation: sentence start", "punctuation: sentence start"),
        ("punctuation", "punctuation"),
        ("sentence start", "punctuation: sentence start"),
        ("punctuation mark", "punctuation: punctuation mark"),
        ("time 12:30", "punctuation: time 12:30"),
    ],
)
def test_reasons_begin_with_the_name_in_the_configuration(reason: str, named: str) -> None:
    monitor = BoundaryMonitor([("punctuation", Scripted(token=Boundary(reason)))], None)
    found = monitor.after_token(1, 1, None)
    assert found is not None and found.reason == named


def test_needs_are_the_union() -> None:
    monitor = BoundaryMonitor([("a", Scripted()), ("b", Scripted())], None)
    assert not (monitor.needs_text or monitor.needs_entropy or monitor.needs_mass)
    needy = [
        ("a", Scripted(needs=frozenset({"entropy"}))),
        ("b", Scripted(needs=frozenset({"text", "attention_drift"}))),
    ]
    monitor = BoundaryMonitor(needy, Letters())
    assert monitor.needs_text and monitor.needs_entropy and monitor.needs_mass
    assert not BoundaryMonitor([], None).needs_text


def test_text_is_fed_once_and_only_where_somebody_needs_it() -> None:
    reader = Scripted(needs=frozenset({"text"}))
    monitor = BoundaryMonitor([("a", reader), ("b", Scripted())], Letters())
    monitor.reset([1, 2, 100])
    monitor.after_token(100, 3, None)
    monitor.after_token(100, 4, None)
    assert [reader.seen[0][1], *(event.text for event in reader.seen[1:])] == ["AB", "ä", ""]
    blind = Scripted()
    monitor = BoundaryMonitor([("b", blind)], Letters())
    monitor.reset([1])
    monitor.after_token(2, 1, None)
    assert blind.seen == [([1], ""), TokenEvent(2, 1, "")]


def test_a_snapshot_covers_detectors_and_text_and_can_be_restored_again() -> None:
    reader = Scripted(needs=frozenset({"text"}))
    monitor = BoundaryMonitor([("a", reader)], Letters())
    monitor.reset([1])
    monitor.after_token(100, 1, None)
    saved = monitor.snapshot()
    for _ in range(2):
        monitor.after_token(100, 2, None)
        monitor.after_token(5, 3, None)
        assert [event.text for event in reader.seen[2:]] == ["ä", "E"]
        monitor.restore(saved)
        assert len(reader.seen) == 2


def test_now_after_a_token_is_refused() -> None:
    monitor = BoundaryMonitor([("late", Scripted(token=Boundary("x", when="now")))], None)
    with pytest.raises(PluginError, match="'late'.*when='now'.*only from after_step") as caught:
        monitor.after_token(1, 1, None)
    assert caught.value.plugin == "late"
