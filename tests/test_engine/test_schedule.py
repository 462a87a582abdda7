"""When the next step is slow: boundaries, deferral, clearing, segment limits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.engine.schedule import SegmentSchedule


def test_without_a_boundary_a_segment_ends_at_its_maximum() -> None:
    schedule = SegmentSchedule(2, 4)
    for _ in range(4):
        assert schedule.slow_reason() is None
        schedule.took_fast()
    assert schedule.slow_reason() == "max_segment"
    schedule.took_slow()
    assert schedule.slow_reason() is None


def test_a_boundary_inside_the_minimum_waits_for_its_end() -> None:
    schedule = SegmentSchedule(3, 9)
    schedule.took_fast()
    schedule.report("sentence")
    assert schedule.slow_reason() is None
    schedule.took_fast()
    assert schedule.slow_reason() is None
    schedule.took_fast()
    assert schedule.slow_reason() == "sentence"


def test_several_boundaries_of_one_gap_are_one_and_the_first_names_it() -> None:
    schedule = SegmentSchedule(2, 9)
    schedule.report("first")
    schedule.report("second")
    schedule.took_fast()
    schedule.took_fast()
    assert schedule.slow_reason() == "first"
    schedule.took_slow()
    schedule.took_fast()
    schedule.took_fast()
    assert schedule.slow_reason() is None


def test_a_slow_step_of_any_cause_clears_a_deferred_boundary() -> None:
    schedule = SegmentSchedule(5, 9)
    schedule.report("deferred")
    schedule.took_slow()
    for _ in range(8):
        schedule.took_fast()
        assert schedule.slow_reason() is None


def test_a_boundary_outranks_the_maximum() -> None:
    schedule = SegmentSchedule(4, 4)
    schedule.report("sentence")
    for _ in range(4):
        assert schedule.slow_reason() is None
        schedule.took_fast()
    assert schedule.slow_reason() == "sentence"


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.integers(1, 6), st.integers(0, 6), st.lists(st.booleans(), max_size=60))
def test_segments_keep_their_limits_and_lose_no_boundary(
    minimum: int, extra: int, events: list[bool]
) -> None:
    """Drives a schedule as the decoder does; events are boundaries reported after each token."""
    schedule = SegmentSchedule(minimum, minimum + extra)
    length, waiting = 0, False
    for event in events:
        if event:
            schedule.report("event")
            waiting = True
        reason = schedule.slow_reason()
        assert (reason is not None) == (
            (waiting and length >= minimum) or length >= minimum + extra
        )
        if reason is None:
            schedule.took_fast()
            length += 1
        else:
            assert reason == ("event" if waiting and length >= minimum else "max_segment")
            schedule.took_slow()
            length, waiting = 0, False
        assert schedule.segment_tokens == length <= minimum + extra


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(0, 1),
    st.lists(st.sampled_from(["", "token", "step", "retry"]), max_size=60),
)
def test_a_lag_puts_a_boundary_off_by_one_step_and_no_further(
    minimum: int, extra: int, lag: int, events: list[str]
) -> None:
    """What may be begun ahead is what happens, unless something is reported meanwhile."""
    schedule = SegmentSchedule(minimum, minimum + extra, lag)
    length, due, expected = 0, 10**6, False
    for event in events:
        if event == "token" and due == 10**6:
            due = max(minimum, length + lag)
        if event == "token":
            schedule.report("event")
        slow = length >= min(due, minimum + extra)
        assert (schedule.slow_reason() is not None) == slow
        if expected:
            # With a lag a boundary cannot undo what was promised; without one it does.
            assert not slow or (event == "token" and not lag)
        expected = False
        if slow or event == "retry":
            assert slow is False or schedule.slow_reason() == (
                "event" if length >= due else "max_segment"
            )
            schedule.took_slow()
            length, due = 0, 10**6
            continue
        expected = schedule.may_continue()
        schedule.took_fast()
        length += 1
        if event == "step" and due == 10**6:
            due = max(minimum, length + lag)
        if event == "step":
            schedule.report("event")
            expected = expected and lag == 1
