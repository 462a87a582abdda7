"""Bodies of tool calls that are JSON, or a name with JSON arguments behind it."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from sfi_agent.session.output.tagged_bodies import function_call, tagged_status
from sfi_agent.session.output.tool_calls import (
    CUT_OFF,
    JSON_DECODER,
    BodyReader,
    BodyStatus,
    RawCall,
    Schemas,
    calls_in_value,
    json_problem,
    unreadable_call,
)

__all__ = [
    "json_calls",
    "json_status",
    "llama_calls",
    "looks_like_llama_call",
    "mistral_calls",
    "named_json_calls",
    "named_json_status",
    "python_tag_calls",
]

_BROKEN = (ValueError, RecursionError)
_BETWEEN_OBJECTS = re.compile(r"(?<=\})\s*\n\s*(?=\{)")
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')
_LLAMA_KEYS = frozenset({"name", "parameters", "arguments", "type", "function", "id"})
_MISTRAL_NAMED = re.compile(
    r"\s*([A-Za-z_][\w.-]*)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*(?=\{)"
)
_CALL_INDEX = re.compile(r"\Afunctions\.|:\d+\Z")


# ---------------------------------------------------------------- JSON objects


def json_calls(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
    """A JSON object, a list of them, or several on lines of their own; also `<function=...>` with
    parameters."""
    text = body.strip()
    if text.startswith("<function="):
        return [function_call(text, closed, schemas)]
    try:
        values = _values(text)
    except _BROKEN as error:
        return [unreadable_call(text, json_problem(error, closed=closed))]
    return [call for value, raw_text in values for call in calls_in_value(value, raw_text)]


def _values(text: str) -> list[tuple[Any, str]]:
    """The values of a text with what each was written as: one, or objects on lines of their own."""
    values: list[tuple[Any, str]] = []
    end = 0
    while not values or text[end:].strip():
        gap = _BETWEEN_OBJECTS.match(text, end)
        if values and gap is None:
            raise json.JSONDecodeError("Extra data", text, end)
        start = gap.end() if values and gap else 0
        value, end = JSON_DECODER.raw_decode(text, start)
        values.append((value, text[start:end]))
    return values


def json_status(body: str) -> Literal["whole", "open", "broken"]:
    """See `BodyStatus`. Bodies with tags instead of JSON are judged by their tags."""
    if body.lstrip().startswith("<function="):
        return tagged_status("parameter=", "parameter")(body)
    try:
        _values(body.strip())
    except ValueError as error:
        unterminated = getattr(error, "msg", "").startswith("Unterminated string")
        return "open" if unterminated else "broken"
    except RecursionError:
        return "broken"
    return "whole"


def llama_calls(body: str, *, tagged: bool) -> list[RawCall] | None:
    """Calls that are a whole message: JSON objects, separated by `;`, commas or white space.

    Returns:
        The calls; None where the text is an answer in JSON and not a call. Behind
        `<|python_tag|>` (`tagged`) everything is a call.
    """
    calls: list[RawCall] = []
    rest = body.strip()
    while rest:
        try:
            value, end = JSON_DECODER.raw_decode(rest)
        except _BROKEN as error:
            if calls or tagged or '"parameters"' in rest or '"arguments"' in rest:
                return [*calls, unreadable_call(rest, json_problem(error, closed=True))]
            return None
        if not tagged and not _is_llama_call(value):
            return [*calls, unreadable_call(rest, "it is not a call")] if calls else None
        calls += calls_in_value(value, rest[:end])
        rest = rest[end:].lstrip("; ,\t\r\n")
    return calls or ([unreadable_call("", "it is empty")] if tagged else None)


def python_tag_calls(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
    """Calls behind `<|python_tag|>`."""
    return llama_calls(body, tagged=True) or []


def looks_like_llama_call(text: str) -> bool:
    """Whether JSON that begins like this may still become a call."""
    match = _FIRST_KEY.match(text)
    return match is None or match.group(1) in _LLAMA_KEYS


def _is_llama_call(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name = inner.get("name", inner.get("function"))
    return isinstance(name, str) and ("parameters" in inner or "arguments" in inner)


def mistral_calls(body: str, closed: bool = False, schemas: Schemas | None = None) -> list[RawCall]:
    """Calls behind `[TOOL_CALLS]`: a JSON list, or `name[ARGS]{json}` per call."""
    calls: list[RawCall] = []
    rest = body.strip()
    while rest:
        named = _MISTRAL_NAMED.match(rest)
        start = named.end() if named else 0
        try:
            value, end = JSON_DECODER.raw_decode(rest[start:])
        except _BROKEN as error:
            name = named.group(1) if named else ""
            return [*calls, unreadable_call(rest, json_problem(error, closed=closed), name)]
        raw = rest[: start + end]
        if named:
            value = {"name": named.group(1), "arguments": value}
        calls += calls_in_value(value, raw)
        rest = rest[start + end :].lstrip().removeprefix("[TOOL_CALLS]").lstrip()
    return calls or [unreadable_call("", "it is empty")]


# ---------------------------------------------------------------- a name, then JSON arguments


def named_json_calls(separator: str) -> BodyReader:
    """Reads `name SEPARATOR {json}`, also `function SEPARATOR name` with fenced JSON behind it."""

    def read(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
        text = body.strip()
        name, arguments = _split_named(text, separator)
        if arguments is None:
            return [unreadable_call(text, f"it has no {separator}" if closed else CUT_OFF, name)]
        try:
            value = JSON_DECODER.decode(arguments) if arguments else {}
        except _BROKEN as error:
            return [unreadable_call(text, json_problem(error, closed=closed), name)]
        if not closed and not arguments:
            return [unreadable_call(text, CUT_OFF, name)]
        return calls_in_value({"name": name, "arguments": value}, text)

    return read


def named_json_status(separator: str) -> BodyStatus:
    """See `BodyStatus`."""

    def status(body: str) -> Literal["whole", "open", "broken"]:
        _, arguments = _split_named(body.strip(), separator)
        return json_status(arguments or "{}")

    return status


def _split_named(text: str, separator: str) -> tuple[str, str | None]:
    head, found, rest = text.partition(separator)
    head, rest = head.strip(), rest.strip()
    if not found:
        return _CALL_INDEX.sub("", head) if len(head.split()) == 1 else "", None
    if head == "function" and not rest.startswith("{"):
        head, _, rest = rest.partition("\n")
        rest = rest.strip()
    if rest.startswith("```"):
        rest = rest.removeprefix("```").removeprefix("json").removesuffix("```").strip()
    return _CALL_INDEX.sub("", head.strip()), rest
