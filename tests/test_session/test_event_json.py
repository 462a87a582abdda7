"""Events as JSON: every kind of event, whatever a model wrote into it."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import (
    InputError,
    Reply,
    StepRecord,
    ToolCall,
    ToolResult,
    TurnEnd,
    Usage,
    event_to_json,
)
from sfi_agent.session.events import Event

EVENTS: tuple[type[Any], ...] = get_args(Event)
TEXTS = st.text(st.characters(), max_size=5)  # lone surrogates too
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.builds(ToolCall, TEXTS, TEXTS, st.dictionaries(TEXTS, DATA, max_size=3), TEXTS)
RECORDS = st.builds(StepRecord, seconds=st.floats(0, 9))
REPLIES = st.builds(
    Reply,
    TEXTS,
    st.lists(CALLS, max_size=2).map(tuple),
    TEXTS,
    st.just(Usage(3, 1, 2, 4)),
    steps=st.lists(RECORDS, max_size=3).map(tuple),
)
st.register_type_strategy(ToolCall, CALLS)
st.register_type_strategy(StepRecord, RECORDS)
st.register_type_strategy(Reply, REPLIES)


def events(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Events of one kind; a kind that comes later is built from the types of its fields."""
    if kind is ToolCall:
        return CALLS
    if kind is TurnEnd:
        return st.builds(TurnEnd, REPLIES)
    return st.builds(kind)


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, bool, int, float)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_event_is_plain_data_with_the_names_of_its_fields(
    kind: type[Any], data: st.DataObject
) -> None:
    event = data.draw(events(kind))
    found = event_to_json(event)
    assert is_plain(found)
    # Any reader of JSON and any encoder takes it.
    text = json.dumps(found, allow_nan=False, ensure_ascii=False)
    assert json.loads(text.encode("utf-8")) == found
    words = re.findall("[A-Z][a-z]*", kind.__name__)
    assert found["type"] == "_".join(words).lower()
    shown, left_out = (Reply, {"steps"}) if kind is TurnEnd else (kind, set())
    fields = {item.name for item in dataclasses.fields(shown)} - left_out
    assert set(found) == {"type", *fields}
    assert "type" not in fields


def test_names_of_events_are_distinct_and_stable() -> None:
    names = {
        "text_delta",
        "reasoning_delta",
        "tool_call",
        "tool_start",
        "tool_result",
        "step",
        "turn_end",
    }
    kinds = [re.sub("(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in EVENTS]
    assert len(set(kinds)) == len(kinds) and names <= set(kinds)


@settings(deadline=None)
@given(REPLIES)
def test_the_end_of_a_turn_has_its_steps_only_where_asked(reply: Reply) -> None:
    short, whole = event_to_json(TurnEnd(reply)), event_to_json(TurnEnd(reply), steps=True)
    assert "steps" not in short
    assert [item["token_id"] for item in whole.pop("steps")] == [
        item.token_id for item in reply.steps
    ]
    assert whole == short
    assert short["usage"] == dataclasses.asdict(reply.usage)
    assert len(short["tool_calls"]) == len(reply.tool_calls)


def test_values_come_through_as_they_are() -> None:
    call = ToolCall("call_0", "f", {"a": [1, 2.5, None, True, {"b": "ü"}]}, "raw")
    assert event_to_json(call) == {
        "type": "tool_call",
        "id": "call_0",
        "name": "f",
        "arguments": {"a": [1, 2.5, None, True, {"b": "ü"}]},
        "raw_text": "raw",
        "error": None,
    }
    numbers = [float("nan"), float("inf"), -float("inf")]
    odd = ToolCall("c", "f", {"a": numbers, "\ud800": "\ud800"}, "")
    assert event_to_json(odd)["arguments"] == {"a": ["NaN", "Infinity", "-Infinity"], "?": "?"}


@pytest.mark.parametrize("given_value", [None, "text", Usage(), TurnEnd, {"type": "step"}])
def test_what_is_no_event_is_refused(given_value: Any) -> None:
    with pytest.raises(InputError, match="Turn an event into JSON"):
        event_to_json(given_value)


def test_an_event_that_holds_no_data_is_refused() -> None:
    for value in (object(), {1, 2}, b"x"):
        with pytest.raises(InputError, match="plain JSON data"):
            event_to_json(ToolResult("c", "f", value))  # type: ignore[arg-type]
