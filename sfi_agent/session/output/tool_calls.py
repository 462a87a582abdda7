"""Tool calls as models write them: one call, and calls in JSON data.

A call that cannot be read is data, not an exception: it keeps its raw text and says what is wrong,
so that the model can be told and write it again.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

__all__ = [
    "CUT_OFF",
    "JSON_DECODER",
    "BodyReader",
    "BodyStatus",
    "RawCall",
    "Schemas",
    "calls_in_value",
    "finite_number",
    "json_problem",
    "plain_data",
    "unreadable_call",
]

Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]
"""JSON schema of the arguments, by tool name."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class _CallDecoder(json.JSONDecoder):
    """JSON as models write it: line breaks inside strings are taken, but no number that is none."""

    def __init__(self) -> None:
        super().__init__(
            strict=False,
            parse_float=finite_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_object_of,
        )

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        value, end = super().raw_decode(s, idx)
        return (plain_data(value) if _SURROGATE_ESCAPE.search(s) else value), end


def finite_number(text: str) -> float:
    """The nearest float, the largest one for numbers beyond all of them."""
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


class _Repeating(dict[str, Any]):
    """An object with keys that were written twice: the last value counts, if any."""

    twice = ""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating, keys = _Repeating(found), [key for key, _ in pairs]
    repeating.twice = next(key for index, key in enumerate(keys) if key in keys[:index])
    return repeating


def plain_data(value: Any) -> Any:
    """JSON data with halves of characters, which JSON can escape and no text may hold, replaced.

    Raises:
        ValueError: It holds a number that is none.
    """
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, dict):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return _refuse_constant("NaN")
    return finite_number(str(value)) if isinstance(value, float) else value


JSON_DECODER = _CallDecoder()

_NAME = re.compile(r'"(?:name|tool_name)"\s*:\s*"([^"\\]{1,64})"')
_NAME_KEYS = ("name", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = frozenset({"id", "index", "tool_call_id", "type"})


@dataclass(frozen=True, slots=True)
class RawCall:
    """One call as the model wrote it, before it has an id. See `ToolCall` for the fields."""

    name: str
    raw_text: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


BodyReader: TypeAlias = Callable[[str, bool, Schemas], list[RawCall]]
"""Calls in a body; whether the model closed it; the tools' schemas."""
BodyStatus: TypeAlias = Callable[[str], Literal["whole", "open", "broken"]]
"""Whether a body that a closing tag follows is complete, still inside a value ("open": the tag
belongs to the value), or broken."""
CUT_OFF = "it is not closed; it may be cut off"


def unreadable_call(raw_text: str, error: str, name: str = "") -> RawCall:
    """A call that cannot be read; its name is looked for in the text where none is given."""
    match = _NAME.search(raw_text)
    return RawCall(name or (match.group(1) if match else ""), raw_text, error=error)


def calls_in_value(value: Any, raw_text: str) -> list[RawCall]:
    """Calls in parsed data: `{"name", "arguments"}` (or "tool_name", "parameters"), the same under
    "function", or a list of such."""
    if isinstance(value, list):
        if not value:
            return [unreadable_call(raw_text, "it is an empty list")]
        return [call for item in value for call in calls_in_value(item, _text_of(item))]
    if not isinstance(value, dict):
        return [unreadable_call(raw_text, 'it is no JSON object with "name" and "arguments"')]
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name = next((inner[key] for key in _NAME_KEYS if key in inner), None)
    if not isinstance(name, str) or not name:
        return [unreadable_call(raw_text, 'it has no "name"')]
    arguments = next((inner[key] for key in _ARGUMENT_KEYS if key in inner), None)
    if isinstance(arguments, str):
        try:
            arguments = JSON_DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            problem = f'"arguments": {json_problem(error, closed=True)}'
            return [unreadable_call(raw_text, problem, name)]
    if arguments is None:
        # Arguments under a key that nobody knows are not run as none.
        unknown = inner.keys() - {*_NAME_KEYS, *_ARGUMENT_KEYS, *_OTHER_KEYS}
        if unknown:
            problem = f'it has no "arguments", but {", ".join(map(repr, sorted(unknown)))}'
            return [unreadable_call(raw_text, problem, name)]
        arguments = {}
    for part in (inner, arguments):
        if isinstance(part, _Repeating):
            return [unreadable_call(raw_text, f"{part.twice!r} is given twice", name)]
    if not isinstance(arguments, dict):
        return [unreadable_call(raw_text, '"arguments" is no JSON object', name)]
    return [RawCall(name, raw_text, arguments)]


def json_problem(error: Exception, *, closed: bool) -> str:
    """What is wrong with JSON text, for the model."""
    if isinstance(error, json.JSONDecodeError):
        problem = f"its JSON is broken at character {error.pos}: {error.msg}"
    elif isinstance(error, RecursionError):
        problem = "its JSON is nested too deeply"
    else:
        problem = f"its JSON is broken: {error}"
    return problem if closed else f"{problem} (the call is not closed; it may be cut off)"


def _text_of(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)
