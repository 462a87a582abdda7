"""Grammars of arguments, letter by letter: what they allow is read back and fits the schema, and
what fits can be written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.session.grammar.argument_formats import held_arguments
from sfi_agent.session.grammar.call_forms import ArgumentStyle
from sfi_agent.session.output.json_bodies import json_calls
from sfi_agent.session.output.loose_bodies import braced_calls, python_calls
from sfi_agent.session.output.tagged_bodies import function_call, invoke_calls, key_value_calls
from sfi_agent.session.output.tool_calls import RawCall
from sfi_agent.session.tool_use.json_schema import check_arguments, without_references
from tests.test_session.letter_grammars import matcher_of, walked

WRITTEN: dict[ArgumentStyle, tuple[str, str]] = {
    "json": ('{"name": "f", "arguments": ', "}"),
    "python": ("[f(", ")]"),
    "braces": ("call:f{", "}"),
    "qwen_xml": ("<function=f>\n", "</function>"),
    "glm_xml": ("f\n", ""),
    "minimax_xml": ('<invoke name="f">', "</invoke>"),
}
"""What stands around the arguments of a call."""
READERS: dict[ArgumentStyle, Callable[[str, Mapping[str, Any]], list[RawCall]]] = {
    "json": lambda text, schemas: json_calls(text, True, schemas),
    "python": lambda text, schemas: python_calls(text, True, schemas),
    "braces": lambda text, schemas: braced_calls('<|"|>')(text, True, schemas),
    "qwen_xml": lambda text, schemas: [function_call(text, True, schemas)],
    "glm_xml": lambda text, schemas: key_value_calls(text, True, schemas),
    "minimax_xml": lambda text, schemas: invoke_calls(text, True, schemas),
}
STYLES = list(WRITTEN)


def matcher(style: ArgumentStyle, schema: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    """Of a whole call, and which keywords are given up."""
    held = held_arguments(style, schema, [])
    around = [{"type": "const_string", "value": text} for text in WRITTEN[style] if text]
    elements = [around[0], *([held.format] if held.format else []), *around[1:]]
    return matcher_of({"type": "sequence", "elements": elements}), held.not_held


def call_read(style: ArgumentStyle, text: str, schema: dict[str, Any]) -> RawCall:
    (call,) = READERS[style](text, {"f": without_references(schema)})
    return call


# ---------------------------------------------------------------- schemas and what fits them

words = st.text("ab é日{}[](),:='\"\\<>|/_", max_size=6)
plain = st.text("ab é日", min_size=1, max_size=4)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


def fixed(
    schema: dict[str, Any], values: st.SearchStrategy[Any]
) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    return schema, values


_WRITABLE: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    fixed({"type": "string"}, words),
    fixed({"type": "string", "minLength": 1, "maxLength": 4}, plain),
    fixed({"type": "string", "pattern": "^a+b"}, st.sampled_from(["ab", "aabé x"])),
    fixed({"type": "string", "pattern": "é$"}, st.sampled_from(["é", "aé"])),
    fixed({"type": "string", "format": "date"}, st.just("2024-02-29")),
    fixed({"type": "string", "enum": ["a'b", 'c"d', "e\\n"]}, st.sampled_from(["a'b", 'c"d'])),
    fixed({"type": "integer"}, st.integers(-(10**20), 10**20)),
    fixed({"type": "integer", "minimum": -3, "maximum": 12.5}, st.integers(-3, 12)),
    fixed({"type": "integer", "multipleOf": 3}, st.sampled_from([-3, 0, 27])),
    fixed({"type": "number"}, numbers),
    fixed({"type": "number", "exclusiveMinimum": 0, "maximum": 2}, st.sampled_from([0.5, 2, 1.75])),
    fixed({"type": "boolean"}, st.booleans()),
    fixed({"type": "integer", "nullable": True}, st.none() | st.integers(0, 9)),
    fixed({"type": ["boolean", "null"]}, st.none() | st.booleans()),
    fixed({"enum": [1, None, [True, "a"], {"k": 1.5}]}, st.sampled_from([1, None])),
    fixed({"allOf": [{"type": "integer"}, {"minimum": 2}]}, st.integers(2, 40)),
    fixed({"type": "integer", "anyOf": [{"minimum": 9}, {"enum": [1, "a"]}]}, st.just(1)),
    fixed({"$ref": "#/$defs/count"}, st.integers(0, 50)),
    fixed({"type": "array", "items": {"$ref": "#/$defs/count"}}, st.lists(st.integers(0, 50))),
    fixed(
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        st.lists(words, min_size=1, max_size=3),
    ),
    fixed(
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
            "items": {"type": "null"},
            "minItems": 1,
            "maxItems": 3,
        },
        st.sampled_from([[1], [1, True], [1, False, None]]),
    ),
    fixed({"type": "array", "maxItems": 0}, st.just([])),
    fixed(
        {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b_c": {"type": "number"}, "d": {}},
            "required": ["b_c"],
        },
        st.builds(lambda a, b: {"a": a, "b_c": b}, words, numbers)
        | st.just({"b_c": 1.5, "d": None}),
    ),
    fixed(
        {"type": "object", "additionalProperties": {"type": "integer"}},
        st.dictionaries(st.sampled_from(["a", "b_c", "dd"]), st.integers(0, 9)),
    ),
]
_INSIDE: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    ({"type": "object"}, st.just({"a": [1, {"b": None}], "c": True})),
    ({"type": "array"}, st.just([1, [], {"b": False}])),
    ({"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}, st.just({"next": {}})),
]
DEFINITIONS: dict[str, Any] = {
    "count": {"type": "integer", "minimum": 0},
    "tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}},
}
NAMES = ["first", "second", "third"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema of arguments, and arguments that fit it, in its order."""
    chosen = draw(st.lists(st.sampled_from([*_WRITABLE, *_INSIDE]), min_size=1, max_size=3))
    required = [name for name in NAMES[: len(chosen)] if draw(st.booleans())]
    properties = {name: schema for name, (schema, _) in zip(NAMES, chosen, strict=False)}
    schema = {"type": "object", "properties": properties, "required": required}
    arguments = {
        name: draw(values)
        for name, (_, values) in zip(NAMES, chosen, strict=False)
        if name in required or draw(st.booleans())
    }
    return {**schema, "$defs": DEFINITIONS}, arguments


def braced(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{braced(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(braced, value)) + "]"
    return json.dumps(value)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def written(style: ArgumentStyle, arguments: dict[str, Any]) -> str:
    """As chat templates of the family write them."""
    pairs = arguments.items()
    inside = {
        "json": lambda: json.dumps(arguments, ensure_ascii=False),
        "python": lambda: ", ".join(f"{key}={value!r}" for key, value in pairs),
        "braces": lambda: braced(arguments)[1:-1],
        "qwen_xml": lambda: "".join(
            f"<parameter={k}>\n{bare(v)}\n</parameter>\n" for k, v in pairs
        ),
        "glm_xml": lambda: "".join(
            f"<arg_key>{k}</arg_key>\n<arg_value>{bare(v)}</arg_value>\n" for k, v in pairs
        ),
        "minimax_xml": lambda: "".join(
            f'<parameter name="{k}">{bare(v)}</parameter>\n' for k, v in pairs
        ),
    }
    opening, closing = WRITTEN[style]
    return f"{opening}{inside[style]()}{closing}"


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_what_fits_can_be_written_and_is_read_back(style: ArgumentStyle, case: Any) -> None:
    schema, arguments = case
    text = written(style, arguments)
    call = call_read(style, text, schema)
    if style.endswith("xml") and (call.error or call.arguments != arguments):
        return  # Bare texts with blanks around them, or with tags in them, are others.
    assert (call.name, call.error, call.arguments) == ("f", None, arguments)
    found, _ = matcher(style, schema)
    assert found.accept_string(text), (text, schema)
    assert found.is_completed()


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=40, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_what_is_allowed_is_read_and_fits(style: ArgumentStyle, case: Any, seed: int) -> None:
    schema, _ = case
    found, not_held = matcher(style, schema)
    lots = random.Random(seed)
    for _ in range(2):
        found.reset()
        text = walked(found, lots, longest=600)
        if text is None:
            continue
        call = call_read(style, text, schema)
        assert call.error is None, (text, call.error, schema)
        if not not_held:
            assert check_arguments(call.arguments, schema)[1] == (), (text, schema)
            plain_schema = json.loads(json.dumps(schema).replace('"nullable": true', '"x": 1'))
            if "nullable" not in json.dumps(schema):
                jsonschema.validate(call.arguments, plain_schema)
