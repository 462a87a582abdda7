"""Argument schemas of MCP servers in the form that chat templates and the argument check know.

Servers write any JSON schema. Templates and `json_schema.check_arguments` look at `type`,
`properties` and `nullable` where a value is described, as `get_json_schema` of transformers writes
them. So local references are replaced by what they point to, and "this or null" is written as
`nullable`. What cannot be replaced (recursion, references to elsewhere) stays with its definitions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

__all__ = ["MAX_SCHEMA_NODES", "canonical_parameters"]

MAX_SCHEMA_NODES = 20_000
"""References are replaced up to this size: a few of them can stand for astronomically much."""

_SCHEMAS_BY_NAME = frozenset(
    {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
)
_SCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
_SCHEMAS = frozenset(
    {"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"}
)


def canonical_parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments: an object with properties, references replaced.

    Args:
        schema: A server's schema, plain JSON data; it is left as it is.

    Raises:
        ValueError: It is no valid schema, or not one of an object.
    """
    # Lone surrogates are no text and stop every tokenizer.
    text = json.dumps(schema, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    plain: dict[str, Any] = json.loads(text)
    _require_valid(plain)
    try:
        found = _References(plain, MAX_SCHEMA_NODES).replaced()
    except (_TooLarge, RecursionError):
        found = _References(plain, None).replaced()
    found.pop("$schema", None)
    found.setdefault("properties", {})
    if found.setdefault("type", "object") != "object":
        raise ValueError(f"its arguments are of type {found['type']!r}, not an object")
    return found


def _require_valid(schema: dict[str, Any]) -> None:
    """Raise ValueError for what no JSON schema may be: the argument check relies on it."""
    from jsonschema import Draft3Validator, Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    validator = validator_for(schema, default=Draft202012Validator)
    if validator is Draft3Validator:  # It allows forms of `type` and `required` unknown since.
        validator = Draft202012Validator
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        raise ValueError(
            f"its schema is not valid at {where or 'its root'}: {error.message}"
        ) from (error)


class _TooLarge(Exception):
    pass


class _References:
    """Replaces references inside one document.

    Args:
        document: The schema.
        max_nodes: Most schemas that may come out; None leaves all references as they are.
    """

    def __init__(self, document: dict[str, Any], max_nodes: int | None) -> None:
        self._document = document
        self._max_nodes = max_nodes
        self._nodes = 0
        self._kept_local = False

    def replaced(self) -> dict[str, Any]:
        found = self._schema(self._document, ("#",))
        if not self._kept_local:
            for name in ("$defs", "definitions"):
                found.pop(name, None)
        return found

    def _schema(self, schema: Any, trail: tuple[str, ...]) -> dict[str, Any]:
        self._nodes += 1
        if self._max_nodes is not None and self._nodes > self._max_nodes:
            raise _TooLarge
        if not isinstance(schema, dict):
            return {"not": {}} if schema is False else {}
        reference = schema.get("$ref")
        own = {
            key: self._value(key, value, trail) for key, value in schema.items() if key != "$ref"
        }
        if not isinstance(reference, str):
            return _nullable(own)
        target = _lookup(self._document, reference) if self._max_nodes is not None else None
        if target is None or reference in trail:
            self._kept_local = self._kept_local or reference.startswith("#")
            return {"$ref": reference, **own}
        return {**self._schema(target, (*trail, reference)), **own}

    def _value(self, key: str, value: Any, trail: tuple[str, ...]) -> Any:
        if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
            if key in ("$defs", "definitions"):
                return value  # As written: they matter only where a reference to them stays.
            return {name: self._schema(item, trail) for name, item in value.items()}
        if key in _SCHEMA_LISTS and isinstance(value, list):
            return [self._schema(item, trail) for item in value]
        if key in _SCHEMAS and isinstance(value, dict):
            return self._schema(value, trail)
        return value


def _lookup(document: Any, reference: str) -> Any:
    """What a local reference such as "#/$defs/Place" points to; None where there is nothing."""
    if reference == "#":
        return document
    if not reference.startswith("#/"):
        return None
    found = document
    for part in reference[2:].split("/"):
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found if isinstance(found, dict | bool) else None


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """`anyOf: [X, null]` as X with `nullable`, the form that templates were made for."""
    choices = schema.get("anyOf")
    if not isinstance(choices, list) or len(choices) != 2:
        return schema
    others = [choice for choice in choices if choice.get("type") != "null"]
    if len(others) != 1 or "const" in others[0] or not isinstance(others[0].get("type"), str):
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if rest.keys() & others[0].keys() - {"title", "description", "default", "examples"}:
        return schema
    return {**others[0], **rest, "nullable": True}
