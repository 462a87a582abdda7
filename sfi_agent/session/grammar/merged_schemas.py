"""Two JSON schemas as one that allows what both allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sfi_agent.session.tool_use.json_schema import same_json

__all__ = ["merged"]

_LARGEST = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_SMALLEST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}


def merged(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """Both in one, without combinations of schemas and references.

    Returns:
        The schema, None where nothing is allowed by both, and the keywords of the second one that
        cannot be said beside those of the first.
    """
    found, given_up = dict(first), set[str]()
    for key, value in second.items():
        if key not in found:
            found[key] = value
        elif key in _MERGERS and (key != "multipleOf" or _are_whole(found[key], value)):
            found[key] = _MERGERS[key](found[key], value)
        elif key in _LARGEST or key in _SMALLEST:
            found[key] = (max if key in _LARGEST else min)(found[key], value)
        elif not same_json(found[key], value):
            given_up.add(key)
    for whole, part in (("additionalProperties", "properties"), ("items", "prefixItems")):
        # What one of them names may be a further one to the other.
        if whole in first or whole in second:
            left, right = (one.get(part) or () for one in (first, second))
            if len(left) != len(right) or any(name not in left for name in right):
                given_up.add(whole)
    return (None if found.get("type") == [] else found), frozenset(given_up)


def _types(first: Any, second: Any) -> Any:
    names = [[one] if isinstance(one, str) else list(one) for one in (first, second)]
    both = [name for name in names[0] if name in names[1]]
    for one, other in (names, names[::-1]):
        if "integer" in one and "number" in other and "integer" not in both:
            both.append("integer")
    return both[0] if len(both) == 1 else both


def _values(first: list[Any], second: list[Any]) -> list[Any]:
    return [value for value in first if any(same_json(value, other) for other in second)]


def _properties(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: {"allOf": [first[key], second[key]]} for key in first if key in second}
    return {**first, **second, **both}


def _are_whole(first: Any, second: Any) -> bool:
    return isinstance(first, int) and isinstance(second, int)


def _both(first: Any, second: Any) -> Any:
    return {"allOf": [first, second]}


_MERGERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "type": _types,
    "enum": _values,
    "properties": _properties,
    "required": lambda first, second: [*first, *(name for name in second if name not in first)],
    "items": _both,
    "uniqueItems": lambda first, second: bool(first or second),
    "multipleOf": math.lcm,
}
