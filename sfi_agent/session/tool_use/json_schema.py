"""Checking call arguments against a tool's schema, with messages a model can act on.

The part of JSON schema that tool descriptions use: type (one or several), nullable, enum, const,
anyOf, oneOf and allOf, items and prefixItems, properties, required, additionalProperties, limits of
numbers, texts and lists, pattern, references to definitions of the same schema, and true and false
in the place of a schema. Other keywords are not checked; the tool's own code sees the value.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "check_arguments",
    "required_names",
    "same_json",
    "show_value",
    "without_references",
]

_DEFINITIONS = ("$defs", "definitions")
_NUMBER_LIMITS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("minimum", "be at least", operator.ge),
    ("maximum", "be at most", operator.le),
    ("exclusiveMinimum", "be greater than", operator.gt),
    ("exclusiveMaximum", "be less than", operator.lt),
    ("multipleOf", "be a multiple of", lambda value, limit: limit != 0 and value % limit == 0),
)


def check_arguments(
    arguments: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments ready for the call, and what is wrong with them (empty if nothing is).

    Arguments that the schema does not name are wrong whatever `additionalProperties` says, unless
    it allows them explicitly. Whole numbers written as floats become integers where an integer is
    asked for.
    """
    schema = {"additionalProperties": False, **without_references(parameters)}
    try:
        problems = tuple(_problems(dict(arguments), schema, ""))
        ready = {} if problems else _convert(dict(arguments), schema)
    except RecursionError:
        return {}, ("The arguments are nested too deeply.",)
    if problems:
        return {}, problems
    assert isinstance(ready, dict)
    return ready, ()


def required_names(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """What an object must hold. Older drafts have true or false there, inside a property."""
    names = schema.get("required")
    return tuple(names) if isinstance(names, (list, tuple)) else ()


def same_json(first: Any, second: Any) -> bool:
    """Whether JSON schema takes two values for the same: 1 and 1.0 are, 1 and true are not."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_json, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            same_json(item, second[key]) for key, item in first.items()
        )
    return bool(first == second)


def show_value(value: Any) -> str:
    """A value for a message, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def without_references(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with what its local references point to in their place: the same objects, so that
    definitions may hold each other and themselves."""
    definitions = {
        f"#/{place}/{name}": definition
        for place in _DEFINITIONS
        for name, definition in (parameters.get(place) or {}).items()
    }
    if not definitions:
        return parameters
    places: dict[str, dict[str, Any]] = {target: {} for target in definitions}

    def replaced(part: Any) -> Any:
        if isinstance(part, list):
            return [replaced(item) for item in part]
        if not isinstance(part, Mapping):
            return part
        rest = {
            name: replaced(item)
            for name, item in part.items()
            if name != "$ref" and name not in _DEFINITIONS
        }
        place = places.get(str(part.get("$ref")))
        return rest if place is None else {**rest, "allOf": [place, *rest.get("allOf", ())]}

    for target, definition in definitions.items():
        known = {"allOf": [definition]} if isinstance(definition, bool) else definition
        places[target].update(replaced(known))
    whole = replaced(parameters)
    assert isinstance(whole, dict)
    return whole


def _problems(value: Any, schema: Mapping[str, Any] | bool, path: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{_name(path)} is not allowed, got {show_value(value)}."
        return
    if value is None and schema.get("nullable"):
        return
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices and not any(not list(_problems(value, choice, path)) for choice in choices):
        kinds = " or ".join(_kind(choice) for choice in choices)
        yield f"{_name(path)} must be {kinds}, not {show_value(value)}."
        return
    allowed = _types(schema)
    if allowed and not any(_is_type(value, name) for name in allowed):
        yield f"{_name(path)} must be of type {' or '.join(allowed)}, not {show_value(value)}."
        return
    for part in schema.get("allOf") or ():
        yield from _problems(value, part, path)
    yield from _enum_problems(value, schema, path)
    for limit in _limits(value, schema):
        yield f"{_name(path)} must {limit}, not {show_value(value)}."
    if isinstance(value, dict):
        yield from _object_problems(value, schema, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, _item_schema(schema, index), f"{path}[{index}]")


def _enum_problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if "enum" in schema and not _is_in(value, schema["enum"]):
        choices = ", ".join(show_value(item) for item in schema["enum"])
        yield f"{_name(path)} must be one of {choices}, not {show_value(value)}."
    if "const" in schema and not same_json(value, schema["const"]):
        yield f"{_name(path)} must be {show_value(schema['const'])}, not {show_value(value)}."


def _is_in(value: Any, values: Iterable[Any]) -> bool:
    return any(same_json(value, item) for item in values)


def _limits(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """The limits that a number, text or list does not keep."""
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        for keyword, words, kept in _NUMBER_LIMITS:
            limit: Any = schema.get(keyword)
            if _is_type(limit, "number") and not kept(value, limit):
                yield f"{words} {limit}"
    elif isinstance(value, (str, list)):
        unit, more = ("characters", "Length") if isinstance(value, str) else ("items", "Items")
        least, most = schema.get(f"min{more}", 0), schema.get(f"max{more}", len(value))
        if not least <= len(value) <= most:
            yield (
                f"have {least} to {most} {unit}"
                if f"max{more}" in schema
                else (f"have at least {least} {unit}")
            )
    if isinstance(value, str) and not _matches(value, schema.get("pattern")):
        yield f"match the pattern {schema['pattern']}"
    if isinstance(value, list) and schema.get("uniqueItems"):
        if any(_is_in(item, value[:index]) for index, item in enumerate(value)):
            yield "have no item twice"


def _matches(text: str, pattern: Any) -> bool:
    try:
        return not isinstance(pattern, str) or re.search(pattern, text) is not None
    except re.error:
        return True  # A pattern of another dialect: the tool's own code sees the text.


def _object_problems(value: dict[str, Any], schema: Mapping[str, Any], path: str) -> Iterator[str]:
    properties = schema.get("properties") or {}
    prefix = f"{path}." if path else ""
    for name in required_names(schema):
        if name not in value:
            yield f"Missing argument {prefix}{name} ({_kind(properties.get(name, {}))})."
    rest = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            yield from _problems(item, properties[name], f"{prefix}{name}")
        elif rest is False:
            known = ", ".join(properties) or "none"
            yield f"Unknown argument {prefix}{name}; known arguments: {known}."
        else:
            yield from _problems(item, rest, f"{prefix}{name}")


def _convert(value: Any, schema: Mapping[str, Any] | bool) -> Any:
    if isinstance(schema, bool):
        return value
    for part in schema.get("allOf") or ():
        value = _convert(value, part)
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


def _item_schema(schema: Mapping[str, Any], index: int) -> Mapping[str, Any] | bool:
    leading = schema.get("prefixItems") or ()
    found = leading[index] if index < len(leading) else schema.get("items")
    return found if isinstance(found, (Mapping, bool)) else {}


def _types(schema: Mapping[str, Any] | bool) -> tuple[str, ...]:
    if isinstance(schema, bool):
        return ()
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


def _kind(schema: Mapping[str, Any] | bool) -> str:
    if isinstance(schema, bool):
        return "any value" if schema else "nothing"
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(_kind(choice) for choice in choices)
    parts = [part for part in schema.get("allOf") or () if _types(part)]
    return " or ".join(_types(schema) or (_types(parts[0]) if parts else ())) or "any value"


def _name(path: str) -> str:
    return f"Argument {path}" if path else "The arguments"
