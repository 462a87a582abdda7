"""Checking arguments: what fits passes, and what does not is named by its path."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent.session.tool_use.json_schema import check_arguments


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


@pytest.mark.parametrize(
    ("value", "schema", "problem"),
    [
        (0, {"minimum": 1}, "must be at least 1, not 0."),
        (5, {"maximum": 4.5}, "must be at most 4.5, not 5."),
        (1, {"exclusiveMinimum": 1}, "must be greater than 1, not 1."),
        (1, {"exclusiveMaximum": 1}, "must be less than 1, not 1."),
        (7, {"multipleOf": 2}, "must be a multiple of 2, not 7."),
        ("", {"minLength": 1}, 'must have at least 1 characters, not "".'),
        ("abc", {"minLength": 1, "maxLength": 2}, 'must have 1 to 2 characters, not "abc".'),
        ("abc", {"pattern": "^[0-9]+$"}, 'must match the pattern ^[0-9]+$, not "abc".'),
        ([], {"minItems": 2}, "must have at least 2 items, not []."),
        ([1, 2], {"maxItems": 1}, "must have 0 to 1 items, not [1, 2]."),
        ([1, 2, 1], {"uniqueItems": True}, "must have no item twice, not [1, 2, 1]."),
        ("b", {"allOf": [{"type": "string"}, {"enum": ["a"]}]}, 'must be one of "a", not "b".'),
    ],
)
def test_limits_are_kept(value: Any, schema: dict[str, Any], problem: str) -> None:
    assert check(value, schema)[1] == (f"Argument x {problem}",)


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (True, {"minimum": 3}),
        (3, {"minimum": 3, "maximum": 3, "multipleOf": 1.5}),
        ("a", {"pattern": "(?P<broken"}),
        ("abc", {"minimum": 5, "minLength": 3, "maxLength": 3, "pattern": "b"}),
        ([1, 2], {"uniqueItems": True, "minItems": 2, "maxItems": 2}),
        (None, {"type": "integer", "nullable": True, "minimum": 3}),
    ],
)
def test_limits_of_other_kinds_of_values_do_not_matter(value: Any, schema: dict[str, Any]) -> None:
    assert check(value, schema) == (value, ())


def test_references_are_followed() -> None:
    tree = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Tree"}},
        "required": ["value"],
    }
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/Tree", "description": "A tree."}},
        "$defs": {"Tree": tree},
    }
    assert check_arguments({"tree": {"value": 1, "next": {"value": 2}}}, schema)[1] == ()
    _, problems = check_arguments({"tree": {"value": 1, "next": {"value": "x"}}}, schema)
    assert problems == ('Argument tree.next.value must be of type integer, not "x".',)
    deep: dict[str, Any] = {"value": "x"}
    for _ in range(60):
        deep = {"value": 1, "next": deep}
    (problem,) = check_arguments({"tree": deep}, schema)[1]
    assert problem.endswith('.next.value must be of type integer, not "x".')
    # Whole floats become integers behind references as well; what is missing is named.
    ready, _ = check_arguments({"tree": {"value": 2.0}}, schema)
    assert isinstance(ready["tree"]["value"], int)
    _, problems = check_arguments({}, {**schema, "required": ["tree"]})
    assert problems == ("Missing argument tree (object).",)


def test_a_schema_that_never_ends_is_a_problem_and_no_crash() -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/A"}},
        "$defs": {"A": {"allOf": [{"$ref": "#/$defs/A"}]}},
    }
    assert check_arguments({"x": 1}, schema)[1] == ("The arguments are nested too deeply.",)
