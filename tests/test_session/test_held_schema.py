"""Schemas and patterns in the form that grammars hold: they allow no more than the given ones, and
what they give up has a name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfi_agent.session.grammar.held_schema import SchemaReduction
from sfi_agent.session.grammar.text_patterns import CONTROLS, whole_pattern
from sfi_agent.session.tool_use.json_schema import check_arguments
from tests.test_session.letter_grammars import allows, matcher_of

IN_JSON = '"\\' + CONTROLS
DEFINITIONS: dict[str, Any] = {
    "count": {"type": "integer"},
    "tree": {"anyOf": [{"type": "string"}, {"properties": {"a": {"$ref": "#/$defs/tree"}}}]},
}

_SIMPLE: list[Any] = [
    *({}, True, {"type": "integer"}, {"type": "string"}, {"type": "boolean"}, {"type": "null"}),
    *({"type": ["integer", "null"]}, {"type": "number"}, {"minimum": 2}, {"maxLength": 2}),
    *({"type": "integer", "minimum": 1.5}, {"type": "integer", "exclusiveMinimum": 1}),
    *({"type": "integer", "maximum": 2.5, "multipleOf": 2}, {"type": "number", "maximum": 2.5}),
    *({"type": "string", "minLength": 1, "maxLength": 2}, {"type": "string", "pattern": "^a"}),
    *({"type": "string", "pattern": "b$"}, {"pattern": "^[ab]+$"}, {"enum": [1, "a", None]}),
    *({"const": True}, {"enum": ["a", 3], "type": "string"}, {"enum": [1, 3], "minimum": 2}),
    *({"$ref": "#/$defs/count"}, {"$ref": "#/$defs/tree"}, {"$ref": "#/$defs/count", "minimum": 2}),
]


def _combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=3)
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("ab"), inner)},
        optional={
            "required": st.lists(st.sampled_from("ab"), max_size=1),
            "additionalProperties": inner | st.booleans(),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner},
        optional={"prefixItems": lists, "minItems": st.integers(0, 2), "maxItems": st.just(2)},
    )
    either = st.fixed_dictionaries(
        {"anyOf": lists},
        optional={"type": st.sampled_from(["integer", "string"]), "nullable": st.just(True)},
    )
    return st.one_of(objects, arrays, either, st.fixed_dictionaries({"allOf": lists}))


schemas: st.SearchStrategy[Any] = st.recursive(st.sampled_from(_SIMPLE), _combined, max_leaves=6)
_atoms = st.sampled_from([None, True, False, 0, 1, 2, 3, -4, 1.5, 2.5, "", "a", "b", "ab", "cab"])
instances: st.SearchStrategy[Any] = st.recursive(
    _atoms,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(schema=schemas, values=st.lists(instances, min_size=4, max_size=8))
def test_a_reduced_schema_allows_no_more_unless_it_says_so(schema: Any, values: list[Any]) -> None:
    reduction = SchemaReduction(DEFINITIONS, IN_JSON)
    reduced = reduction.reduced(schema)
    assume('"enum": []' not in json.dumps(reduced))  # A contradiction: there is no grammar.
    whole = {**reduced, **reduction.definitions_of(reduced)}
    found = matcher_of({"type": "json_schema", "json_schema": whole})
    for value in values:
        found.reset()
        fits = not check_arguments(
            {"it": value}, {"properties": {"it": schema}, "$defs": DEFINITIONS}
        )[1]
        allowed = allows(found, json.dumps(value))
        assert fits or not allowed or reduction.not_held, (value, whole)
        if not isinstance(value, (dict, list)):
            assert allowed or not fits, (value, whole)


@pytest.mark.parametrize(
    ("schema", "keywords"),
    [
        ({"type": "array", "uniqueItems": True}, {"uniqueItems"}),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, set()),
        ({"not": {"type": "string"}}, {"not"}),
        ({"type": "string", "pattern": "^(?!a)"}, {"pattern"}),
        ({"type": "string", "pattern": "^a", "maxLength": 3}, {"maxLength"}),
        ({"type": "string", "format": "date", "minLength": 3}, {"minLength"}),
        ({"type": "string", "format": "path"}, set()),
        ({"type": "integer", "maximum": 10**30}, {"maximum"}),
        ({"type": "number", "multipleOf": 0.1}, {"multipleOf"}),
        ({"type": "integer", "multipleOf": 5000}, {"multipleOf"}),
        ({"type": "integer", "multipleOf": 5, "minimum": 1}, {"multipleOf"}),
        ({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 9}, set()),
        ({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}], "type": "string"}, {"pattern"}),
        ({"$ref": "#/$defs/nowhere"}, {"$ref"}),
        ({"$ref": "#/$defs/count", "description": "A number."}, set()),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}], "nullable": True}, set()),
    ],
)
def test_what_is_given_up_is_named(schema: dict[str, Any], keywords: set[str]) -> None:
    reduction = SchemaReduction(DEFINITIONS, IN_JSON)
    reduction.reduced({"type": "array", "items": schema})
    assert reduction.not_held == keywords


# ---------------------------------------------------------------- patterns

PATTERNS = [
    *("", "^$", "a", "^a", "a$", "^a|b$", "a|^b", r"^\d{2}-\d$", "^https?://", "^[^x]+$", "^(a|)$"),
    *(r"^\S+@\S+\.\w+$", r"^[\w.-]+$", '^["a]$', "^(?:a|b)+c?$", "^(ab|c){2}$", "^.{2,4}$"),
    *(r"^\s*a\s*$", "^[a-]$", r"^[+\-.]?$", "^é[à-ü]*$", "^a*?b$", r"^\u00e9$", r"^\x41$"),
    *(r"^-?(0|[1-9][0-9]*)$", "^(?P<n>a)b$", r"^\$a\.$", "x*"),
]
_texts = st.text('aabbcx12-.@ AZé:/_htps"\\$', max_size=6) | st.sampled_from(
    ["https://a", "http://", "12-3", "a@b.c", "ab", "abab", "-10", "éàü"]
)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(_texts, min_size=5, max_size=5))
def test_a_whole_pattern_matches_what_holds_the_pattern(pattern: str, texts: list[str]) -> None:
    whole = whole_pattern(pattern, IN_JSON)
    assert whole is not None
    found = matcher_of(
        {"type": "json_schema", "json_schema": {"type": "string", "pattern": f"^(?:{whole})$"}}
    )
    for text in texts:
        if any(letter in IN_JSON for letter in text):
            assert re.fullmatch(whole, text) is None
            continue
        found.reset()
        allowed = allows(found, json.dumps(text, ensure_ascii=False))
        assert allowed == (re.fullmatch(whole, text) is not None)
        wanted = re.search(pattern, text) is not None
        # Letters beyond ASCII are letters to some readers of patterns only.
        assert allowed == wanted or (wanted and r"\w" in pattern and not text.isascii())


@pytest.mark.parametrize(
    "pattern",
    [
        *('^".*"$', r"^a\\b$", "^(?!a)b$", r"^a\b", r"(a)\1", r"^\p{L}$", "^(?i:a)$", "^a{,3}$"),
        *("^[]a]$", "^(^a)$", "$^", "^(a$|b)$", "^a)(b$", "(", "[", "a\\", "*a", r"^\n$", "[b-a]"),
    ],
)
def test_what_a_grammar_cannot_say_is_no_pattern(pattern: str) -> None:
    assert whole_pattern(pattern, IN_JSON) is None
