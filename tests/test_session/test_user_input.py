"""What users send is checked before anything changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sfi_agent.errors import InputError
from sfi_agent.session.user_input import normalise_messages
from tests.test_session.helpers import assistant, call, call_message, result, user

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", [user("hi")]),
        ("", [user("")]),
        (user("hi"), [user("hi")]),
        ([SYSTEM, user("a"), assistant("b"), user("c")], None),
        ((user("a"), user("b")), None),
        (
            user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            [user("ab")],
        ),
        (
            [user("a"), {**call_message(call()), "content": None}, result("r")],
            [user("a"), call_message(call()), result("r")],
        ),
        (
            [user("a"), {**assistant("b"), "reasoning_content": "hm"}, user("c")],
            None,
        ),
        ({**user("hi"), "name": None}, [user("hi")]),
    ],
)
def test_every_form_becomes_messages(given: Any, expected: Any) -> None:
    messages = normalise_messages(given)
    assert list(messages) == (list(given) if expected is None else expected)


def test_the_callers_objects_are_not_shared() -> None:
    given = call_message(call(query="a"))
    messages = normalise_messages([user("a"), given, result("r")])
    given["tool_calls"][0]["function"]["arguments"]["query"] = "changed"
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"query": "a"}


def with_arguments(arguments: Any) -> list[dict[str, Any]]:
    message = call_message(call())
    message["tool_calls"][0]["function"]["arguments"] = arguments
    return [user("a"), message, result("r")]


def test_arguments_may_be_the_text_that_services_hand_out() -> None:
    given = {"text": "x", "list": [1, 2.5, None, True], "more": {"a": []}}
    expected = normalise_messages(with_arguments(given))
    assert expected[1]["tool_calls"][0]["function"]["arguments"] == given
    assert normalise_messages(with_arguments(json.dumps(given))) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("no JSON", "no JSON"),
        ("[1]", "tool_calls"),
        (None, "tool_calls"),
        ({"a": [float("nan")]}, "nan"),
        ('{"a": Infinity}', "inf"),
        ({"a": {"b": "\ud800"}}, "surrogate"),
        ({"\udc00": 1}, "surrogate"),
        ({1: "a"}, "got 1"),
        ({"a": {1, 2}}, "{1, 2}"),
    ],
)
def test_arguments_that_no_json_has_are_refused(arguments: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        normalise_messages(with_arguments(arguments))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "int"),
        (b"hi", "bytes"),
        ([], "empty list"),
        (["hi"], "'hi'"),
        ({"role": "robot", "content": "a"}, "role='robot'"),
        ({"content": "a"}, "role=None"),
        ({"role": "user"}, "content; got None"),
        ({"role": "user", "content": 3}, "content; got 3"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "image"),
        ({"role": "user", "content": ["x"]}, "'x'"),
        ({"role": "user", "content": "a", "images": []}, "images"),
        ({"role": "user", "content": "\udc80"}, "surrogate"),
        ({"role": "user", "content": "a", "tool_calls": [1]}, "user message"),
        ({"role": "assistant", "content": "a", "tool_calls": [1]}, "tool_calls"),
        ({**assistant("a"), "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"),
        (assistant("a"), "last message of role 'assistant'"),
        ([user("a"), SYSTEM], "system"),
        (SYSTEM, "last message of role 'system'"),
        (result("r"), "no call waits"),
        ({"role": "tool", "content": "r"}, "tool_call_id=None"),
        (
            [user("a"), call_message(call(0), call(1)), result("r"), user("b")],
            "no answer to call_1",
        ),
        ([user("a"), call_message(call(0), call(1)), result("r")], "no answer to call_1"),
        ([user("a"), call_message(call()), result("r"), result("r")], "tool_call_id='call_0'"),
    ],
)
def test_what_no_template_takes_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        normalise_messages(given)


def test_inside_a_conversation() -> None:
    with pytest.raises(InputError, match="very beginning"):
        normalise_messages([SYSTEM, user("a")], first=False)
    answers = [result("a"), result("b", 1)]
    open_ids = ["call_0", "call_1"]
    assert list(normalise_messages(answers, first=False, open_call_ids=open_ids)) == answers
    with pytest.raises(InputError, match="no answer to call_1"):
        normalise_messages(answers[0], first=False, open_call_ids=open_ids)
    # Nobody has to answer: the user may speak instead.
    assert normalise_messages("never mind", first=False, open_call_ids=open_ids)
