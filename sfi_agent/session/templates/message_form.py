"""How one chat template wants its messages, beyond the form that users and sessions give them.

Chat templates differ in what they take for a tool call, for text and for reasoning. Which form a
template takes is found by trying (`chat_template.py`); here messages are brought into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeAlias

__all__ = ["CALL_FORMS", "REASONING_KEYS", "Message", "MessageForm", "shape_messages"]

Message: TypeAlias = Mapping[str, Any]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How a template wants messages, beyond the common form.

    Attributes:
        arguments_as_text: Call arguments are JSON text, not a mapping.
        nine_character_ids: Call ids are nine letters and digits.
        one_call_per_turn: An assistant message holds a single call; further ones are rendered as
            turns of their own.
        content_as_parts: The content of a message is a list of parts, not a text.
        reasoning_key: Name of the field that takes an assistant's reasoning.
        text_or_reasoning: An assistant message with calls takes its text or its reasoning, not
            both; the text is then left out.
    """

    arguments_as_text: bool = False
    nine_character_ids: bool = False
    one_call_per_turn: bool = False
    content_as_parts: bool = False
    reasoning_key: str = REASONING_KEYS[0]
    text_or_reasoning: bool = False


CALL_FORMS: tuple[tuple[bool, bool, bool], ...] = tuple(
    (as_text, nine, single)
    for single in (False, True)
    for as_text in (False, True)
    for nine in (False, True)
)
"""Forms of calls to try, the common one first: `arguments_as_text`, `nine_character_ids`,
`one_call_per_turn`."""


def shape_messages(messages: Sequence[Message], form: MessageForm) -> Iterator[dict[str, Any]]:
    """The messages in the template's form (copies).

    A tool message without a name gets that of the call it answers: some templates show it.
    """
    index = 0
    messages = list(_with_tool_names(messages))
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls") or ()
        if form.one_call_per_turn and len(calls) > 1:
            results: list[Message] = []
            while index < len(messages) and messages[index].get("role") == "tool":
                results.append(messages[index])
                index += 1
            yield from (_shape_one(part, form) for part in _one_by_one(message, results))
        else:
            yield _shape_one(message, form)


def _with_tool_names(messages: Sequence[Message]) -> Iterator[Message]:
    names: dict[Any, Any] = {}
    for message in messages:
        names.update((c.get("id"), c["function"]["name"]) for c in message.get("tool_calls") or ())
        call_id = message.get("tool_call_id")
        if message.get("role") == "tool" and "name" not in message and names.get(call_id):
            message = {**message, "name": names[call_id]}
        yield message


def _one_by_one(message: Message, results: Sequence[Message]) -> Iterator[Message]:
    """One assistant message per call, each followed by its result."""
    waiting = list(results)
    for number, call in enumerate(message["tool_calls"]):
        first = message if number == 0 else {"role": "assistant", "content": ""}
        yield {**first, "tool_calls": [call]}
        for result in [item for item in waiting if item.get("tool_call_id") == call.get("id")]:
            waiting.remove(result)
            yield result
    yield from waiting


def _shape_one(message: Message, form: MessageForm) -> dict[str, Any]:
    shaped = dict(message)
    calls = shaped.get("tool_calls")
    if calls:
        shaped["tool_calls"] = [_shape_call(call, form) for call in calls]
    if form.nine_character_ids and message.get("tool_call_id"):
        shaped["tool_call_id"] = _nine_characters(message["tool_call_id"])
    reasoning = shaped.pop(REASONING_KEYS[0], None)
    if reasoning is not None:
        shaped[form.reasoning_key] = reasoning
        if calls and form.text_or_reasoning:
            shaped["content"] = ""
    if form.content_as_parts and isinstance(shaped.get("content"), str):
        shaped["content"] = [{"type": "text", "text": shaped["content"]}]
    return shaped


def _shape_call(call: Mapping[str, Any], form: MessageForm) -> dict[str, Any]:
    shaped, function = dict(call), dict(call["function"])
    if form.arguments_as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    if form.nine_character_ids and "id" in shaped:
        shaped["id"] = _nine_characters(shaped["id"])
    return {**shaped, "function": function}


def _nine_characters(call_id: str) -> str:
    match = re.fullmatch(r"call_(\d{1,5})", call_id)
    return f"call{int(match[1]):05d}" if match else sha256(call_id.encode()).hexdigest()[:9]
