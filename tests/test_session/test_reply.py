"""Token accounting of a turn, its sum over turns, and how a reply shows itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sfi_agent.errors import InputError
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.events import Step, TextDelta, ToolCall, TurnEnd
from sfi_agent.session.reply import Reply, Usage


def test_usage_adds_up_and_keeps_the_first_reason() -> None:
    first = Usage(10, 4, 6, 3, 1)
    second = Usage(20, 20, 0, 5, 0, "template_rewrote_history")
    third = Usage(1, 0, 1, 1, 0, "tools_changed")
    total = first + second + third
    assert total == Usage(31, 24, 7, 9, 1, "template_rewrote_history")
    assert sum([second, third], Usage()) == second + third


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((10, 4, 5, 0, 0), "cached_tokens \\+ prefilled_tokens == prompt_tokens"),
        ((0, -1, 1, 0, 0), ">= 0"),
        ((1, 0, 1, 2, 3), "reasoning_tokens <= output_tokens"),
    ],
)
def test_usage_that_does_not_add_up_is_refused(numbers: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Usage(*numbers)


def test_usage_adds_to_usage_only() -> None:
    other: Any = 1
    with pytest.raises(TypeError):
        _ = Usage() + other


def test_a_reply_shows_what_matters_in_one_line() -> None:
    calls = (ToolCall("call_0", "search", {}, "{}"), ToolCall("call_1", "", {}, "{", "broken"))
    reply = Reply("x" * 200, calls, "thought", Usage(7, 3, 4, 5, 2, "history_edited"), "tool_calls")
    shown = repr(reply)
    assert "\n" not in shown and len(shown) < 300
    for part in ("search", "(malformed)", "3 cached + 4 prefilled + 5 output", "history_edited"):
        assert part in shown
    assert repr(Reply("Hi")) == (
        "Reply('Hi', finish_reason='stop', tokens=0 cached + 0 prefilled + 0 output)"
    )


def test_records_are_frozen() -> None:
    record = StepRecord("slow", None, "prefill", 10, 1, 0.1, 9, 5)
    for value in (record, Usage(), Reply(""), TextDelta("a"), Step(record, 5, "a")):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
        assert not hasattr(value, "__dict__")
    assert TurnEnd(Reply("a")) == TurnEnd(Reply("a"))
