"""Bodies of tool calls in the formats of model families, good and broken."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from sfi_agent.session.output.call_styles import detect_call_format
from sfi_agent.session.output.json_bodies import json_calls, llama_calls, mistral_calls
from sfi_agent.session.output.loose_values import LooseReader
from sfi_agent.session.output.tool_calls import RawCall, calls_in_value
from tests import chat_templates


def brief(calls: list[RawCall] | None) -> list[tuple[str, Any]]:
    return [(item.name, item.error or item.arguments) for item in calls or []]


def test_formats_are_told_by_what_the_template_writes() -> None:
    found = {
        name: detect_call_format(getattr(chat_templates, name))
        for name in ("CHATML", "LLAMA", "MISTRAL", "GEMMA", "CHANGES_THE_CLOSE")
    }
    assert found == {
        "CHATML": "hermes",
        "LLAMA": "llama",
        "MISTRAL": "mistral",
        "GEMMA": "none",
        "CHANGES_THE_CLOSE": "none",
    }
    assert detect_call_format("... <|python_tag|> ...") == "llama"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [("f", {"a": 1})]),
        ('\n\n{"arguments":{"a":"\\u00e9"},"name":"f"} ', [("f", {"a": "é"})]),
        ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ('{"name": "f"}', [("f", {})]),
        ('{"name": "f", "arguments": null}', [("f", {})]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        ('{"name": "f", "arguments": {"text": "two\nlines"}}', [("f", {"text": "two\nlines"})]),
        ('{"function": {"name": "f", "arguments": {}}}', [("f", {})]),
        ('[{"name": "f"}, {"name": "g"}]', [("f", {}), ("g", {})]),
    ],
)
def test_hermes(body: str, expected: list[tuple[str, Any]]) -> None:
    assert brief(json_calls(body, True, {})) == expected


@pytest.mark.parametrize(
    ("body", "name", "says"),
    [
        ('{"name": "f", "arguments": {"a": 1}', "f", "broken at character 35"),
        ('{"name": "f", "arguments": {a: 1}}', "f", "property name"),
        ("{}", "", 'no "name"'),
        ("[]", "", "empty list"),
        ("3", "", "no JSON object"),
        ("", "", "Expecting value"),
        ('{"name": "f", "arguments": [1]}', "f", "no JSON object"),
        ('{"name": "f", "arguments": "a=1"}', "f", '"arguments": its JSON'),
        ('{"name": 3, "arguments": {}}', "", 'no "name"'),
    ],
)
def test_broken_hermes_calls_keep_their_text(body: str, name: str, says: str) -> None:
    (found,) = json_calls(body, True, {})
    assert found.error is not None and says in found.error
    assert (found.name, found.raw_text, found.arguments) == (name, body, {})


def test_a_cut_call_is_called_cut() -> None:
    (found,) = json_calls('{"name": "f", "arg', False, {})
    assert found.error is not None and "cut off" in found.error
    # Complete JSON misses nothing but its tag.
    (found,) = json_calls('{"name": "f", "arguments": {}}', False, {})
    assert found.error is None


def test_parameters_in_tags_are_typed_by_the_schema() -> None:
    schemas = {"f": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}
    body = (
        "\n<function=f>\n<parameter=n>\n3\n</parameter>\n"
        "<parameter=s>\n3\n  x\n</parameter>\n</function>\n"
    )
    assert brief(json_calls(body, True, schemas)) == [("f", {"n": 3, "s": "3\n  x"})]
    broken = body.replace("\n3\n</parameter>", "\nthree\n</parameter>", 1)
    assert json_calls(broken, True, schemas)[0].arguments["n"] == "three"
    for cut, closed in ((body[:60], False), (body, False)):
        (found,) = json_calls(cut, closed, schemas)
        assert found.name == "f" and found.error is not None


@pytest.mark.parametrize(
    ("body", "tagged", "expected"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', False, [("f", {"a": 1})]),
        ('{"type": "function", "name": "f", "parameters": {}}', False, [("f", {})]),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', False, "fg"),
        ('{"name": "f", "parameters": {}}\n{"name": "g", "arguments": {}}', True, "fg"),
        ('{"name": "Ada", "age": 3}', False, None),
        ('{"answer": 42}', False, None),
        ('{"name": "Ada", "ag', False, None),
        ("", False, None),
    ],
)
def test_llama(body: str, tagged: bool, expected: Any) -> None:
    calls = llama_calls(body, tagged=tagged)
    if isinstance(expected, str):
        assert [item.name for item in calls or []] == list(expected)
    else:
        assert (brief(calls) or None) == expected


@pytest.mark.parametrize(
    ("body", "tagged", "name"),
    [
        ('{"name": "f", "parameters": {"a": ', False, "f"),
        ("print(3)", True, ""),
        ("", True, ""),
        ('{"name": "f"} and text', True, ""),
    ],
)
def test_broken_llama_calls(body: str, tagged: bool, name: str) -> None:
    calls = llama_calls(body, tagged=tagged)
    assert calls is not None
    assert calls[-1].error is not None and calls[-1].name == name


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('[{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', [("f", {"a": 1})]),
        ('f[ARGS]{"a": 1}', [("f", {"a": 1})]),
        ('f[CALL_ID]x1[ARGS]{}[TOOL_CALLS]g{"b": 2}', [("f", {}), ("g", {"b": 2})]),
        ('[{"name": "f"}, {"name": "g"}]', [("f", {}), ("g", {})]),
    ],
)
def test_mistral(body: str, expected: list[tuple[str, Any]]) -> None:
    assert brief(mistral_calls(body)) == expected


@pytest.mark.parametrize(
    ("body", "names"),
    [('[{"name": "f", "argu', ["f"]), ('f{}[TOOL_CALLS]g{"a', ["f", "g"]), ("", [""])],
)
def test_broken_mistral_calls_keep_the_good_ones(body: str, names: list[str]) -> None:
    calls = mistral_calls(body)
    assert [item.name for item in calls] == names
    assert calls[-1].error is not None
    assert all(item.error is None for item in calls[:-1])


def test_values_that_are_no_calls() -> None:
    assert calls_in_value([1], "[1]")[0].error is not None
    assert calls_in_value({"function": "f", "arguments": {}}, "")[0].name == "f"


# ---------------------------------------------------------------- what JSON cannot say


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": 1,}', "broken at character"),
        ("{'a': 1}", "broken at character"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        ('"NaN"', "no number"),
    ],
)
def test_what_json_cannot_say_is_told_to_the_model(arguments: str, says: str) -> None:
    hermes = json_calls(f'{{"name": "f", "arguments": {arguments}}}', True, {})
    for calls in (hermes, mistral_calls(f"f[ARGS]{arguments}") if arguments[0] == "{" else hermes):
        assert [item.name for item in calls] == ["f"]
        assert calls[0].error is not None and says in calls[0].error


@pytest.mark.parametrize("text", ["1e999", "-2E+8101201", "9" * 400 + ".5"])
def test_numbers_beyond_all_floats_are_the_largest(text: str) -> None:
    (call,) = json_calls(f'{{"name": "f", "arguments": {{"a": {text}}}}}', True, {})
    assert call.arguments == {"a": math.copysign(sys.float_info.max, float(text))}
    assert LooseReader(text).value() == call.arguments["a"]


def test_halves_of_characters_are_replaced() -> None:
    body = r'{"name": "f", "arguments": {"\ud83d": ["\ud83d\ude00", "a\udc00b", "\u00e9"]}}'
    (call,) = json_calls(body, True, {})
    assert call.arguments == {"\ufffd": ["\U0001f600", "a\ufffdb", "é"]}
    assert json_calls(r'{"name": "\ud83d"}', True, {})[0].name == "\ufffd"


def test_several_calls_in_one_body() -> None:
    call = '{"name": "f", "arguments": {"a": "}\\n{"}}'
    assert brief(json_calls(f"{call}\n{call}\n\n{call}", True, {})) == [("f", {"a": "}\n{"})] * 3
    raw = [item.raw_text for item in json_calls(f"{call} \n {call}", True, {})]
    assert raw == [call, call]
    # One of them is cut off or no call: none is certain.
    for body in (f"{call}\n{call[:-1]}", f"{call}{call}", f"{call}\nand text", f"{call}\n"):
        calls = json_calls(body, True, {})
        assert len(calls) == 1 and (calls[0].error is None) == (body == f"{call}\n")


@pytest.mark.parametrize("key", ["args", "input", "a"])
def test_arguments_under_an_unknown_key_are_no_call_without_arguments(key: str) -> None:
    ((name, error),) = brief(calls_in_value({"name": "f", key: {"a": 1}}, ""))
    assert name == "f" and f"it has no \"arguments\", but '{key}'" in error
    assert brief(calls_in_value({"name": "f", "id": "x", "type": "function"}, "")) == [("f", {})]
