"""Checking arguments: what fits passes, and what does not is named by its path."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent.session.json_schema import check_arguments


def check(value: Any, schema: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    ready, problems = check_arguments({"x": value}, {"type": "object", "properties": {"x": schema}})
    return ready.get("x"), problems


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ("a", {"type": "string"}),
        (1, {"type": "number"}),
        (1.5, {"type": ["integer", "number"]}),
        (None, {"type": "string", "nullable": True}),
        (None, {"type": "string", "enum": ["a"], "nullable": True}),
        ([1, [2]], {"type": "array"}),
        ([1, "a"], {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}),
        ({"k": 1}, {"type": "object", "additionalProperties": {"type": "integer"}}),
        ({"deep": {"k": "v"}}, {"type": "object"}),
        (2, {"anyOf": [{"type": "string"}, {"type": "integer"}]}),
        ("b", {"const": "b"}),
        (object, {"type": "a type of another draft"}),
        ("anything", {}),
    ],
)
def test_what_fits_passes_unchanged(value: Any, schema: dict[str, Any]) -> None:
    assert check(value, schema) == (value, ())


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        (1, {"type": "string"}, "Argument x must be of type string, not 1."),
        (True, {"type": "number"}, "Argument x must be of type number, not true."),
        (None, {"type": "string"}, "Argument x must be of type string, not null."),
        (1.5, {"type": "integer"}, "Argument x must be of type integer, not 1.5."),
        (
            [1, "a"],
            {"items": {"type": "integer"}},
            'Argument x[1] must be of type integer, not "a".',
        ),
        (
            {"k": {"n": "1"}},
            {"additionalProperties": {"properties": {"n": {"type": "integer"}}}},
            'Argument x.k.n must be of type integer, not "1".',
        ),
        ({}, {"required": ["n"], "properties": {"n": {"type": "integer"}}}, "Missing argument x.n"),
        (
            {"m": 1},
            {"properties": {"n": {}}, "additionalProperties": False},
            "Unknown argument x.m; known arguments: n.",
        ),
        (
            [],
            {"anyOf": [{"type": "string"}, {"type": "integer", "nullable": True}]},
            "Argument x must be string or integer or null, not [].",
        ),
        ("c", {"const": "b"}, 'Argument x must be "b", not "c".'),
    ],
)
def test_what_does_not_fit_is_named(value: Any, schema: dict[str, Any], problem: str) -> None:
    _, problems = check(value, schema)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_whole_floats_become_integers_where_one_is_asked_for() -> None:
    ready, _ = check(2.0, {"type": "integer"})
    assert isinstance(ready, int)
    ready, _ = check([2.0], {"items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}})
    assert isinstance(ready[0], int)
    ready, _ = check(2.0, {"type": ["integer", "number"]})
    assert isinstance(ready, float)


def test_unknown_arguments_are_wrong_unless_allowed() -> None:
    assert check_arguments({"x": 1}, {"properties": {}})[1]
    assert not check_arguments({"x": 1}, {"properties": {}, "additionalProperties": True})[1]


def test_long_values_are_shortened() -> None:
    _, problems = check("x" * 500, {"type": "integer"})
    assert len(problems[0]) < 150
