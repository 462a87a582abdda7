"""Whether a JSON schema that somebody gives for a tool is one, before anything is checked by it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["schema_problem"]

_ONE = ("not", "if", "then", "else", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def schema_problem(schema: Any) -> str | None:
    """What is wrong with it, with the path; None where it can be read.

    Keywords that nobody reads here may hold anything. Null for a list or for properties is taken
    for none, and limits and `required` may be true or false, as in older drafts of JSON schema.
    """
    try:
        return next(_problems(schema, "parameters"), None)
    except RecursionError:
        return "it is nested too deeply"


def _problems(schema: Any, path: str) -> Iterator[str]:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield f"{path}={schema!r} is no schema"
        return
    yield from _own_problems(schema, path)
    for place, inner in _inner(schema):
        yield from _problems(inner, f"{path}.{place}")


def _own_problems(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    def wrong(key: str, wanted: str) -> str:
        return f"{path}.{key}={schema[key]!r}, which is no {wanted}"

    declared = schema.get("type", "string")
    if not (isinstance(declared, str) or _are_texts(declared)):
        yield wrong("type", "name of a type or list of such")
    if not isinstance(schema.get("enum", []), list):
        yield wrong("enum", "list")
    for key in _LISTS:
        if not isinstance(schema.get(key) or [], list):
            yield wrong(key, "list")
    for key in _NAMED:
        if not isinstance(schema.get(key) or {}, Mapping):
            yield wrong(key, "object")
    required = schema.get("required") or []
    if not (isinstance(required, bool) or _are_texts(required)):
        yield wrong("required", "list of names")
    for key in _COUNTS:
        count = schema.get(key, 0)
        if not isinstance(count, (int, float)) or count < 0 or count != int(count):
            yield wrong(key, "number of things")
    for key in _NUMBERS:
        value = schema.get(key, 0)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            yield wrong(key, "number")
    if not isinstance(schema.get("pattern", ""), str):
        yield wrong("pattern", "regular expression")


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in (*_ONE, "additionalProperties"):
        if key in schema:
            yield key, schema[key]
    items = schema.get("items")
    items = True if items is None else items
    # A list of them is prefixItems of older drafts.
    lists = {key: schema[key] for key in _LISTS if isinstance(schema.get(key), list)}
    for key, found in {**lists, **({"items": items} if isinstance(items, list) else {})}.items():
        for index, part in enumerate(found):
            yield f"{key}[{index}]", part
    if not isinstance(items, list):
        yield "items", items
    for key in _NAMED:
        if isinstance(schema.get(key), Mapping):
            for name, part in schema[key].items():
                yield f"{key}.{name}", part


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
