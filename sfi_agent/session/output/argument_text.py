"""Arguments that models write as bare text, typed by the tool's schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sfi_agent.session.output.tool_calls import JSON_DECODER

__all__ = ["value_of_text"]

_TRUTH = {"true": True, "True": True, "false": False, "False": False}
_NOTHING = frozenset({"null", "None"})
_DEEPEST = 8
"""Of alternatives inside each other: definitions may hold themselves."""


def value_of_text(text: str, schema: Mapping[str, Any] | bool) -> Any:
    """The value that a bare text stands for.

    A text stays what it is wherever a string is allowed, or where the schema names no type. Else it
    is read as JSON, with Python's `True`, `False` and `None`; what cannot be read stays a text, so
    that the check of the arguments can name it.
    """
    types, bare = frozenset(_types(schema, _DEEPEST)), text.strip()
    if "null" in types and bare in _NOTHING:
        return None
    if not types or "string" in types:
        return text
    if "boolean" in types and bare in _TRUTH:
        return _TRUTH[bare]
    try:
        return JSON_DECODER.decode(bare)
    except (ValueError, RecursionError):
        return text


def _types(schema: Mapping[str, Any] | bool, deepest: int) -> Iterator[str]:
    """Names of all types that a schema without references allows; none where it does not say."""
    if isinstance(schema, bool) or not deepest:
        return
    if schema.get("nullable"):
        yield "null"
    declared = schema.get("type")
    if "enum" in schema or "const" in schema:
        for value in schema["enum"] if "enum" in schema else [schema["const"]]:
            yield _NAMES.get(type(value), "object")
    elif declared:
        yield from (declared,) if isinstance(declared, str) else declared
    else:
        for keyword in ("anyOf", "oneOf", "allOf"):
            for choice in schema.get(keyword) or ():
                yield from _types(choice, deepest - 1)


_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
}
