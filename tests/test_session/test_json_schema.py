"""Checking arguments: what fits passes, and what does not is named by its path."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sfi_agent.session.tool_use.json_schema import check_arguments, same_json


def check(value: Any, schema: Any) -> tuple[Any, tuple[str, ...]]:
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


# ---------------------------------------------------------------- as JSON schema has it

_atoms = st.sampled_from([None, False, True, 0, 1, 2, 0.0, 1.0, 1.5, 2**70, "", "1", "true", "é"])
json_values: st.SearchStrategy[Any] = st.recursive(
    _atoms,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(value=json_values, others=st.lists(json_values, min_size=1, max_size=3))
def test_values_are_the_same_where_json_schema_says_so(value: Any, others: list[Any]) -> None:
    for schema in ({"enum": others}, {"const": others[0]}, {"uniqueItems": True}):
        instance = [value, *others] if "uniqueItems" in schema else value
        valid = Draft202012Validator(schema).is_valid(instance)
        assert (check(instance, schema)[1] == ()) == valid
    assert same_json(value, others[0]) == same_json(others[0], value)


_schemas: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(
        [
            *(True, False, {}, {"type": "integer"}, {"type": ["string", "null"]}, {"minimum": 1}),
            *({"maxLength": 1}, {"enum": [1, "1"]}, {"const": True}, {"pattern": "^t"}),
        ]
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries(
            {"items": inner}, optional={"prefixItems": st.lists(inner, min_size=1, max_size=2)}
        ),
        st.fixed_dictionaries(
            {"properties": st.dictionaries(st.sampled_from("ab"), inner)},
            optional={"additionalProperties": inner, "required": st.just(["a"])},
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(value=json_values, schema=_schemas)
def test_the_check_agrees_with_json_schema(value: Any, schema: Any) -> None:
    valid = Draft202012Validator(schema).is_valid(value)
    assert (check(value, schema)[1] == ()) == valid


@pytest.mark.parametrize("schema", [{"type": "array", "items": {}}, {"anyOf": [{"type": "array"}]}])
def test_null_passes_where_it_is_allowed_beside_anything(schema: dict[str, Any]) -> None:
    assert check(None, {**schema, "nullable": True}) == (None, ())
    assert check(None, schema)[1]
