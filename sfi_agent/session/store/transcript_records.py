"""Messages, calls and results as JSON texts, and back with suspicion."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sfi_agent.session.events import ToolCall, ToolResult
from sfi_agent.session.store import strict_json
from sfi_agent.session.store.manifest import SavedConversation, SavedSpan
from sfi_agent.session.transcript import TranscriptSpan

__all__ = ["read_schema", "results_of", "saved_spans", "spans_of", "text_of"]

T = TypeVar("T", ToolCall, ToolResult)

_ROLES = ("system", "user", "assistant", "tool")
_TEXT_KEYS = frozenset({"role", "content", "name", "tool_call_id", "reasoning_content"})


def saved_spans(spans: Sequence[TranscriptSpan]) -> tuple[SavedSpan, ...]:
    """Spans of a transcript as they are written.

    Raises:
        ValueError, TypeError, RecursionError: A message holds something that is no plain data.
    """
    return tuple(
        SavedSpan(
            kind=span.kind,
            start=span.start,
            end=span.end,
            messages=tuple(text_of(dict(message)) for message in span.messages),
            calls=tuple(text_of(call) for call in span.calls),
            complete=span.complete,
        )
        for span in spans
    )


def text_of(value: Mapping[str, Any] | ToolCall | ToolResult) -> str:
    """A message, call or result as JSON; arguments that a model wrote may hold NaN."""
    data = value if isinstance(value, Mapping) else asdict(value)
    text = strict_json.compact(data, finite=False)
    strict_json.parse(text, finite=False)
    return text


def spans_of(saved: SavedConversation) -> list[TranscriptSpan]:
    """The spans again.

    Raises:
        ValueError: A text is none that was written.
    """
    spans = []
    for span in saved.spans:
        messages = tuple(_message(text) for text in span.messages)
        calls = tuple(_record(ToolCall, text) for text in span.calls)
        if span.kind == "output" and len(messages) != 1:
            raise ValueError(f"an output of {len(messages)} messages")
        if span.kind == "raw" and (messages or calls):
            raise ValueError("ids without messages that have some")
        spans.append(
            TranscriptSpan(span.kind, span.start, span.end, messages, calls, span.complete)
        )
    return spans


def results_of(saved: SavedConversation) -> list[ToolResult]:
    """Results that no message has carried yet.

    Raises:
        ValueError: A text is none that was written.
    """
    results = [_record(ToolResult, text) for text in saved.unsent_results]
    "".join(result.content for result in results).encode()
    return results


def read_schema(text: str) -> dict[str, Any]:
    """A tool schema as it was written.

    Raises:
        ValueError: It is none.
    """
    schema = strict_json.parse(text, finite=False)
    function = schema.get("function") if isinstance(schema, dict) else None
    if not isinstance(function, dict) or schema.get("type") != "function":
        raise ValueError("a tool without a function")
    parameters = function.get("parameters", {})
    named = isinstance(function.get("name"), str) and isinstance(function.get("description"), str)
    if not named or not isinstance(parameters, dict):
        raise ValueError("a tool without name, description or parameters")
    if not isinstance(parameters.get("properties", {}), dict):
        raise ValueError("a tool whose arguments are no mapping")
    found: dict[str, Any] = schema
    return found


def _message(text: str) -> dict[str, Any]:
    message = strict_json.parse(text, finite=False)
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ValueError("a message without a role")
    unknown = set(message) - _TEXT_KEYS - {"tool_calls"}
    if unknown or "content" not in message:
        raise ValueError("a message with other keys, or without content")
    if not all(isinstance(message[key], str) for key in _TEXT_KEYS & set(message)):
        raise ValueError("a message whose text is none")
    # Half a character stops every tokenizer. Names may have one: a model wrote them.
    f"{message['content']}{message.get('reasoning_content', '')}".encode()
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise ValueError("a message whose calls are none")
    return message


def _is_call(call: object) -> bool:
    if not isinstance(call, dict) or set(call) != {"id", "type", "function"}:
        return False
    function = call["function"]
    return (
        isinstance(call["id"], str)
        and call["type"] == "function"
        and isinstance(function, dict)
        and set(function) == {"name", "arguments"}
        and isinstance(function["name"], str)
        and isinstance(function["arguments"], dict)
    )


def _record(kind: type[T], text: str) -> T:
    data, hints = strict_json.parse(text, finite=False), get_type_hints(kind)
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not isinstance(data, dict) or not needed <= set(data) <= set(hints):
        raise ValueError(f"something that is no {kind.__name__}")
    for name, value in data.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"a {kind.__name__} with {name}={value!r}"[:200])
    return kind(**data)


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    return isinstance(value, origin or hint)
