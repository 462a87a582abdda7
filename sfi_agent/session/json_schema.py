"""Checking call arguments against a tool's schema, with messages a model can act on.

The part of JSON schema that tool descriptions use: type (one or several), nullable, enum, const,
anyOf and oneOf, items and prefixItems, properties, required, additionalProperties. Other keywords
are not checked; the tool's own code sees the value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["check_arguments"]


def check_arguments(
    arguments: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments ready for the call, and what is wrong with them (empty if nothing is).

    Arguments that the schema does not name are wrong whatever `additionalProperties` says, unless
    it allows them explicitly. Whole numbers written as floats become integers where an integer is
    asked for.
    """
    schema = {"additionalProperties": False, **parameters}
    problems = tuple(_problems(dict(arguments), schema, ""))
    if problems:
        return {}, problems
    ready = _convert(dict(arguments), schema)
    assert isinstance(ready, dict)
    return ready, ()


def _problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and not any(not list(_problems(value, choice, path)) for choice in choices):
        kinds = " or ".join(_kind(choice) for choice in choices)
        yield f"{_name(path)} must be {kinds}, not {_shown(value)}."
        return
    allowed = _types(schema)
    if allowed and not any(_is_type(value, name) for name in allowed):
        yield f"{_name(path)} must be of type {' or '.join(allowed)}, not {_shown(value)}."
        return
    yield from _enum_problems(value, schema, path)
    if isinstance(value, dict):
        yield from _object_problems(value, schema, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, _item_schema(schema, index), f"{path}[{index}]")


def _enum_problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    nullable = value is None and schema.get("nullable")
    if "enum" in schema and value not in schema["enum"] and not nullable:
        choices = ", ".join(_shown(item) for item in schema["enum"])
        yield f"{_name(path)} must be one of {choices}, not {_shown(value)}."
    if "const" in schema and value != schema["const"]:
        yield f"{_name(path)} must be {_shown(schema['const'])}, not {_shown(value)}."


def _object_problems(value: dict[str, Any], schema: Mapping[str, Any], path: str) -> Iterator[str]:
    properties = schema.get("properties") or {}
    prefix = f"{path}." if path else ""
    for name in schema.get("required") or ():
        if name not in value:
            yield f"Missing argument {prefix}{name} ({_kind(properties.get(name, {}))})."
    rest = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            yield from _problems(item, properties[name], f"{prefix}{name}")
        elif rest is False:
            known = ", ".join(properties) or "none"
            yield f"Unknown argument {prefix}{name}; known arguments: {known}."
        elif isinstance(rest, Mapping):
            yield from _problems(item, rest, f"{prefix}{name}")


def _convert(value: Any, schema: Mapping[str, Any]) -> Any:
    for choice in schema.get("anyOf") or schema.get("oneOf") or ():
        if not list(_problems(value, choice, "")):
            return _convert(value, choice)
    if isinstance(value, float) and "integer" in _types(schema) and value.is_integer():
        return value if "number" in _types(schema) else int(value)
    if isinstance(value, dict):
        properties, rest = schema.get("properties") or {}, schema.get("additionalProperties")
        inner = rest if isinstance(rest, Mapping) else {}
        return {name: _convert(item, properties.get(name, inner)) for name, item in value.items()}
    if isinstance(value, list):
        return [_convert(item, _item_schema(schema, index)) for index, item in enumerate(value)]
    return value


def _item_schema(schema: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    leading = schema.get("prefixItems") or ()
    found = leading[index] if index < len(leading) else schema.get("items")
    return found if isinstance(found, Mapping) else {}


def _types(schema: Mapping[str, Any]) -> tuple[str, ...]:
    declared = schema.get("type")
    names = (declared,) if isinstance(declared, str) else tuple(declared or ())
    return (*names, "null") if names and schema.get("nullable") else names


def _is_type(value: Any, name: str) -> bool:
    if name == "integer":
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return whole and not isinstance(value, bool)
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
        "null": (type(None),),
    }
    if name not in kinds:
        return True
    return isinstance(value, kinds[name]) and (name == "boolean" or not isinstance(value, bool))


def _kind(schema: Mapping[str, Any]) -> str:
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(_kind(choice) for choice in choices)
    return " or ".join(_types(schema)) or "any value"


def _name(path: str) -> str:
    return f"Argument {path}" if path else "The arguments"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
