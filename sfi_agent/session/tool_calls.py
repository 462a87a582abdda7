"""Tool calls as model families write them: which format a chat template uses, and its bodies.

A call that cannot be read is data, not an exception: it keeps its raw text and says what is wrong,
so that the model can be told and write it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CallFormat",
    "RawCall",
    "Schemas",
    "calls_in_value",
    "detect_call_format",
    "hermes_calls",
    "llama_calls",
    "looks_like_llama_call",
    "mistral_calls",
    "unreadable_call",
]

CallFormat = Literal["hermes", "llama", "mistral", "none"]
Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schema of the arguments, by tool name."""

_JSON = json.JSONDecoder(strict=False)
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]{1,64})"')
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]*)"')
_LLAMA_KEYS = frozenset({"name", "parameters", "arguments", "type", "function", "id"})
_MISTRAL_NAMED = re.compile(
    r"\s*([A-Za-z_][\w.-]*)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\])?\s*(?=\{)"
)
_XML_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(</function>)?\s*\Z", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RawCall:
    """One call as the model wrote it, before it has an id. See `ToolCall` for the fields."""

    name: str
    raw_text: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def detect_call_format(template_source: str) -> CallFormat:
    """The call format that a chat template shows, by what it writes itself.

    "hermes" is `<tool_call>{json}</tool_call>` (also Qwen), "mistral" is `[TOOL_CALLS]...`,
    "llama" is `{"name": ..., "parameters": ...}` as the whole message, with or without
    `<|python_tag|>`; "none" is a template that writes no calls.
    """
    if "<tool_call>" in template_source:
        return "hermes"
    if "[TOOL_CALLS]" in template_source:
        return "mistral"
    if "<|python_tag|>" in template_source:
        return "llama"
    shows_json = '"name"' in template_source and '"parameters"' in template_source
    return "llama" if shows_json and "tool_calls" in template_source else "none"


def unreadable_call(raw_text: str, error: str, name: str = "") -> RawCall:
    """A call that cannot be read; its name is looked for in the text where none is given."""
    match = _NAME.search(raw_text)
    return RawCall(name or (match.group(1) if match else ""), raw_text, error=error)


def hermes_calls(body: str, *, closed: bool, schemas: Schemas) -> list[RawCall]:
    """Calls between `<tool_call>` and `</tool_call>`: JSON, or `<function=...>` with parameters."""
    text = body.strip()
    if text.startswith("<function="):
        return [_xml_call(text, closed, schemas)]
    try:
        value = _JSON.decode(text)
    except ValueError as error:
        return [unreadable_call(text, _json_error(error, closed))]
    return calls_in_value(value, text)


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
            value, end = _JSON.raw_decode(rest)
        except ValueError as error:
            if calls or tagged or '"parameters"' in rest or '"arguments"' in rest:
                return [*calls, unreadable_call(rest, _json_error(error, closed=True))]
            return None
        if not tagged and not _is_llama_call(value):
            return [*calls, unreadable_call(rest, "it is not a call")] if calls else None
        calls += calls_in_value(value, rest[:end])
        rest = rest[end:].lstrip("; ,\t\r\n")
    return calls or ([unreadable_call("", "it is empty")] if tagged else None)


def looks_like_llama_call(text: str) -> bool:
    """Whether JSON that begins like this may still become a call."""
    match = _FIRST_KEY.match(text)
    return match is None or match.group(1) in _LLAMA_KEYS


def mistral_calls(body: str) -> list[RawCall]:
    """Calls behind `[TOOL_CALLS]`: a JSON list, or `name[ARGS]{json}` per call."""
    calls: list[RawCall] = []
    rest = body.strip()
    while rest:
        named = _MISTRAL_NAMED.match(rest)
        start = named.end() if named else 0
        try:
            value, end = _JSON.raw_decode(rest[start:])
        except ValueError as error:
            name = named.group(1) if named else ""
            return [*calls, unreadable_call(rest, _json_error(error, closed=False), name)]
        raw = rest[: start + end]
        if named:
            value = {"name": named.group(1), "arguments": value}
        calls += calls_in_value(value, raw)
        rest = rest[start + end :].lstrip().removeprefix("[TOOL_CALLS]").lstrip()
    return calls or [unreadable_call("", "it is empty")]


def calls_in_value(value: Any, raw_text: str) -> list[RawCall]:
    """Calls in parsed data: `{"name", "arguments" | "parameters"}`, the same under "function",
    or a list of such."""
    if isinstance(value, list):
        if not value:
            return [unreadable_call(raw_text, "it is an empty list")]
        return [call for item in value for call in calls_in_value(item, _text_of(item))]
    if not isinstance(value, dict):
        return [unreadable_call(raw_text, 'it is no JSON object with "name" and "arguments"')]
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name = inner.get("name", inner.get("function"))
    if not isinstance(name, str) or not name:
        return [unreadable_call(raw_text, 'it has no "name"')]
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = _JSON.decode(arguments)
        except ValueError as error:
            problem = f'"arguments": {_json_error(error, closed=True)}'
            return [unreadable_call(raw_text, problem, name)]
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return [unreadable_call(raw_text, '"arguments" is no JSON object', name)]
    return [RawCall(name, raw_text, arguments)]


def _is_llama_call(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name = inner.get("name", inner.get("function"))
    return isinstance(name, str) and ("parameters" in inner or "arguments" in inner)


def _xml_call(text: str, closed: bool, schemas: Schemas) -> RawCall:
    match = _XML_FUNCTION.match(text)
    # A cut-off call may lack parameters without a sign of it: never run one.
    if match is None or match.group(3) is None or not closed:
        name = match.group(1).strip() if match else ""
        return unreadable_call(text, "it is not closed with </function></tool_call>", name)
    name = match.group(1).strip()
    properties = schemas.get(name, {}).get("properties", {})
    arguments = {
        key.strip(): _xml_value(value, properties.get(key.strip(), {}))
        for key, value in _XML_PARAMETER.findall(match.group(2))
    }
    return RawCall(name, text, arguments)


def _xml_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Parameters are bare text; only where no string is asked for is it read as JSON."""
    declared = schema.get("type", "string")
    if declared == "string" or (isinstance(declared, Sequence) and "string" in declared):
        return text
    try:
        return _JSON.decode(text.strip())
    except ValueError:
        return text


def _json_error(error: ValueError, closed: bool) -> str:
    if isinstance(error, json.JSONDecodeError):
        problem = f"its JSON is broken at character {error.pos}: {error.msg}"
    else:
        problem = f"its JSON is broken: {error}"
    return problem if closed else f"{problem} (the call is not closed; it may be cut off)"


def _text_of(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)
