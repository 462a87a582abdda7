"""Values in Python's notation, in JSON, and between special delimiters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfi_agent.session.output.argument_text import value_of_text
from sfi_agent.session.output.loose_values import LooseReader, LooseSyntaxError, UnterminatedString
from sfi_agent.session.tool_use.json_schema import without_references

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)
)
texts = st.text(st.characters(codec="utf-8"))
values = st.recursive(
    st.one_of(scalars, texts),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(texts, inner)),
    max_leaves=12,
)


def read(text: str, delimiter: str = "") -> Any:
    reader = LooseReader(text, delimiter)
    value = reader.value()
    assert reader.at_end
    return value


@given(value=values)
def test_json_and_python_are_read_alike(value: Any) -> None:
    assert read(json.dumps(value)) == value
    assert read(json.dumps(value, ensure_ascii=False)) == value
    assert read(repr(value)) == value


def delimited(value: Any) -> str:
    if isinstance(value, str):
        return f"<q>{value}<q>"
    if isinstance(value, list):
        return f"[{','.join(map(delimited, value))}]"
    if isinstance(value, dict):
        pairs = (f"{key}:{delimited(item)}" for key, item in value.items())
        return "{" + ",".join(pairs) + "}"
    return json.dumps(value)


names = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True)
plain_texts = texts.filter(lambda text: "<q>" not in f"<q>{text}<q>"[1:-1] and "<q" not in text)


@given(
    value=st.recursive(
        st.one_of(scalars, plain_texts),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(names, inner)),
        max_leaves=8,
    )
)
def test_strings_between_delimiters_hold_anything(value: Any) -> None:
    assert read(delimited(value), "<q>") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'it's', x", "it's"),
        ("'a\\nb\\t\\'c\\' \\q \\u00e9 \\x41'", "a\nb\t'c' \\q é A"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("'two\nlines'", "two\nlines"),
        ("(1, 2)", [1, 2]),
        ("[True, null, None, false,]", [True, None, None, False]),
        ("+3", 3),
        (".5e3", 500.0),
        ("{a: 1, 'b': 2}", {"a": 1, "b": 2}),
    ],
)
def test_what_models_write(text: str, value: Any) -> None:
    assert LooseReader(text).value() == value


@pytest.mark.parametrize("text", ["word", "a.b", "1.2.3", "{1}", "{: 1}", "[1 2]"])
def test_what_is_no_value_is_refused(text: str) -> None:
    with pytest.raises(LooseSyntaxError) as caught:
        LooseReader(text).value()
    assert not isinstance(caught.value, UnterminatedString)


@pytest.mark.parametrize("text", ["", "'abc", '"a\\', "[1,", "{a: ", "<q>abc"])
def test_what_ends_too_early_is_told_apart(text: str) -> None:
    with pytest.raises(UnterminatedString):
        LooseReader(text, "<q>").value()


def test_a_name_given_twice_counts_only_deep_inside() -> None:
    with pytest.raises(LooseSyntaxError, match="given twice"):
        LooseReader("a=1, a=2)").pairs("=", ")")
    assert LooseReader("a={b: 1, b: 2})").pairs("=", ")") == {"a": {"b": 2}}


@given(text=st.text("ab'\"\n ,", max_size=12), quote=st.sampled_from("'\""))
def test_three_quotes_hold_anything_but_themselves(text: str, quote: str) -> None:
    tripled = quote * 3
    if tripled in f"{text}{quote}":
        return
    reader = LooseReader(f"[{tripled}{text}{tripled}, 1]")
    assert reader.value() == [text, 1]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-inf"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(LooseSyntaxError, match="no value"):
        LooseReader(text).value()


def test_deep_nesting_is_refused_and_no_crash() -> None:
    with pytest.raises(LooseSyntaxError, match="deeply"):
        LooseReader("[" * 5000).value()


# ---------------------------------------------------------------- bare texts, typed by the schema


@given(value=values)
def test_bare_texts_become_what_the_schema_says(value: Any) -> None:
    kinds: dict[type, str] = {type(None): "null", bool: "boolean", int: "integer"}
    kinds |= {float: "number", str: "string", list: "array", dict: "object"}
    kind = kinds[type(value)]
    text = value if isinstance(value, str) else json.dumps(value)
    assert value_of_text(text, {"type": kind}) == value
    assert value_of_text(text, {}) == text
    assert value_of_text(text, {"type": ["string", "integer"]}) == text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("True", {"type": "boolean"}, True),
        (" false\n", {"type": "boolean"}, False),
        ("None", {"type": "integer", "nullable": True}, None),
        ("null", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("3", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 3),
        ("3", {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"const": 2}, 2),
        ("two", {"type": "integer"}, "two"),
        ("[1", {"type": "array"}, "[1"),
        ("3", {"allOf": [{"type": "integer"}]}, 3),
        ("3", True, "3"),
        ("3", {"type": "integer", "anyOf": [{"minimum": 9}, {"enum": [3, "a"]}]}, 3),
        ("3", {"type": ["integer", "string"], "enum": [3, 4]}, 3),
        ("3", {"anyOf": [True, {"type": "integer"}]}, 3),
    ],
)
def test_alternatives_and_what_cannot_be_read(text: str, schema: Any, value: Any) -> None:
    assert value_of_text(text, schema) == value


def test_references_to_definitions_say_what_a_bare_text_is() -> None:
    tree: dict[str, Any] = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}
    circle = {"anyOf": [{"$ref": "#/$defs/circle"}, {"type": "integer"}]}
    whole = {
        "properties": {
            "count": {"$ref": "#/$defs/count", "description": "How many."},
            "tree": {"$ref": "#/$defs/tree"},
            "circle": {"$ref": "#/$defs/circle"},
        },
        "$defs": {"count": {"type": "integer"}, "tree": tree, "circle": circle},
    }
    properties = without_references(whole)["properties"]
    assert value_of_text("3", properties["count"]) == 3
    assert value_of_text('{"next": {}}', properties["tree"]) == {"next": {}}
    assert value_of_text("3", properties["circle"]) == 3
