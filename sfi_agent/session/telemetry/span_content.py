"""What was said, in the form that OpenTelemetry's conventions give messages: JSON with parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfi_agent.session.reply import Reply
    from sfi_agent.session.user_input import UserInput

__all__ = [
    "as_json",
    "input_messages",
    "output_messages",
    "system_instructions",
    "tool_definitions",
]


def as_json(value: Any) -> str:
    """Data as one line of JSON. Lone surrogates, which no exporter can send, become "?"."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")


def input_messages(given: UserInput) -> str:
    """The new messages of a turn. What came before stands in the spans of earlier turns."""
    if isinstance(given, str):
        return as_json([{"role": "user", "parts": [_text(given)]}])
    try:
        messages = [given] if isinstance(given, Mapping) else given
        return as_json([_message(message) for message in messages])
    except (AttributeError, TypeError, ValueError):
        return as_json(str(given))  # The session refuses them and says why.


def output_messages(reply: Reply) -> str:
    """The answer with its reasoning and its calls."""
    parts: list[dict[str, Any]] = []
    if reply.reasoning:
        parts.append({"type": "reasoning", "content": reply.reasoning})
    if reply.text:
        parts.append(_text(reply.text))
    for call in reply.tool_calls:
        arguments = dict(call.arguments) if call.error is None else call.raw_text
        parts.append(_call(call.id, call.name, arguments))
    return as_json([{"role": "assistant", "parts": parts, "finish_reason": reply.finish_reason}])


def system_instructions(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The system message among these, None without one."""
    parts = [_text(str(item["content"])) for item in messages if item["role"] == "system"]
    return as_json(parts) if parts else None


def tool_definitions(schemas: Sequence[Mapping[str, Any]]) -> str | None:
    """Tools as the model is told about them, None without any."""
    tools = [{"type": "function", **item["function"]} for item in schemas]
    return as_json(tools) if tools else None


def _text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def _call(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_call", "id": call_id, "name": name, "arguments": arguments}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role", ""), message.get("content")
    if role == "tool":
        response = {"type": "tool_call_response", "id": message.get("tool_call_id")}
        return {"role": role, "parts": [{**response, "response": content}]}
    parts = [_text(content if isinstance(content, str) else as_json(content))] if content else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        parts.append(_call(call.get("id"), function.get("name"), function.get("arguments")))
    return {"role": role, "parts": parts}
