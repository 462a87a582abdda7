"""What users hand to `send`: checked and brought into one form before anything changes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sfi_agent.errors import InputError, explain

__all__ = ["UserInput", "checked_text", "normalise_messages", "refuse_repeated"]

UserInput: TypeAlias = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = frozenset({"role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content"})


def normalise_messages(
    given: UserInput, *, first: bool = True, open_call_ids: Sequence[str] = ()
) -> tuple[dict[str, Any], ...]:
    """Messages of plain data with `role` and `content`, ready for a chat template.

    Args:
        given: A text (a user message), one message, or several.
        first: Whether a conversation begins with them. Only then a system message may lead.
        open_call_ids: Calls of the last assistant turn that nobody has answered; only those may
            be answered by messages of role "tool", and all of them must be before the model goes
            on, if any is.

    Raises:
        InputError: A role, content or order that no template can be given. Nothing has changed.
    """
    if isinstance(given, str):
        items: list[Any] = [{"role": "user", "content": given}]
    elif isinstance(given, Mapping):
        items = [given]
    elif isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray)):
        items = list(given)
    else:
        raise _bad("Send a message", f"{type(given).__name__}", "text, a message, or messages")
    if not items:
        raise _bad("Send messages", "an empty list", "at least one message")
    messages = tuple(_message(item, index) for index, item in enumerate(items))
    _check_order(messages, first)
    _check_tool_messages(messages, list(open_call_ids))
    return messages


def refuse_repeated(
    messages: Sequence[Mapping[str, Any]], past: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse messages that begin with the whole conversation so far, which would be in it twice.

    Services without a memory want it each time; a session keeps it.

    Raises:
        InputError: They do.
    """
    said = [_said(message) for message in past if message["role"] != "system"]
    if len(said) > 1 and [_said(message) for message in messages[: len(said)]] == said:
        raise InputError(
            explain(
                "Send messages into a conversation",
                got=f"a list that begins with all {len(said)} messages of it",
                allowed="messages that are new",
                remedy="Leave out what the session has; to change what was said, rewind to a mark "
                "or open another session with the whole list",
            )
        )


def _said(message: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    calls = tuple(call["function"]["name"] for call in message.get("tool_calls", ()))
    return message["role"], message["content"].strip(), calls


def _message(given: Any, index: int) -> dict[str, Any]:
    where = f"Read message {index}"
    if not isinstance(given, Mapping):
        raise _bad(where, repr(given), 'a mapping such as {"role": "user", "content": "..."}')
    unknown = sorted(str(key) for key in given if key not in _KEYS)
    if unknown:
        raise _bad(where, f"the keys {unknown}", ", ".join(sorted(_KEYS)))
    role = given.get("role")
    if role not in _ROLES:
        raise _bad(where, f"role={role!r}", ", ".join(_ROLES))
    message: dict[str, Any] = {"role": role, "content": _content(given, where)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if given.get(key) is not None:
            message[key] = checked_text(given[key], f"{where}: {key}")
    if given.get("tool_calls"):
        if role != "assistant":
            raise _bad(where, f"tool_calls in a {role} message", "tool_calls of an assistant")
        if not isinstance(given["tool_calls"], (list, tuple)):
            raise _bad(f"{where}: tool_calls", repr(given["tool_calls"]), "a list of calls")
        message["tool_calls"] = [_call(call, where) for call in given["tool_calls"]]
    return message


def _content(given: Mapping[str, Any], where: str) -> str:
    content = given.get("content")
    if content is None and given["role"] == "assistant" and given.get("tool_calls"):
        return ""
    if isinstance(content, (list, tuple)):
        parts = [_part(part, where) for part in content]
        return "".join(parts)
    return checked_text(content, f"{where}: content")


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        shown = part.get("type") if isinstance(part, Mapping) else part
        raise _bad(f"{where}: content", f"a part {shown!r}", '{"type": "text", "text": "..."}')
    return checked_text(part.get("text"), f"{where}: content")


def checked_text(value: Any, where: str) -> str:
    """A text that can be encoded.

    Args:
        value: What was given.
        where: What was attempted, for the message.

    Raises:
        InputError: It is no text, or holds half a character.
    """
    if not isinstance(value, str):
        raise _bad(where, f"{value!r}", "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad(where, f"a lone surrogate at character {error.start}", "valid Unicode") from None
    return str(value)


def _call(given: Any, where: str) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, Mapping) else None
    shape = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": {...}}}'
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        # As services hand calls out: the object as JSON.
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(function, Mapping) or not isinstance(arguments, Mapping):
        raise _bad(f"{where}: tool_calls", repr(given), shape)
    return {
        "id": checked_text(given.get("id"), f"{where}: id of a tool call"),
        "type": "function",
        "function": {
            "name": checked_text(function.get("name"), f"{where}: name of a tool call"),
            "arguments": _plain(arguments, f"{where}: arguments of a tool call"),
        },
    }


def _plain(value: Any, where: str) -> Any:
    """What JSON can say, as a copy."""
    if isinstance(value, str):
        return checked_text(value, where)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return {checked_text(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise _bad(where, repr(value), "what JSON has: objects, lists, text, finite numbers")


def _check_order(messages: Sequence[Mapping[str, Any]], first: bool) -> None:
    for index, message in enumerate(messages):
        if message["role"] == "system" and not (first and index == 0):
            raise _bad(
                f"Read message {index}",
                "a system message inside a conversation",
                "a system message at the very beginning; later, only messages that are new",
            )
    if messages[-1]["role"] not in ("user", "tool"):
        raise _bad(
            "Send messages for the model to answer",
            f"a last message of role {messages[-1]['role']!r}",
            "user or tool at the end",
        )


def _check_tool_messages(messages: Sequence[Mapping[str, Any]], waiting: list[str]) -> None:
    answered = False
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if call_id not in waiting:
                allowed = ", ".join(waiting) or "none, no call waits for an answer"
                raise _bad(f"Read message {index}", f"tool_call_id={call_id!r}", allowed)
            waiting.remove(call_id)
            answered = True
            continue
        if answered and waiting:
            raise _unanswered(waiting)
        if message["role"] == "assistant":
            waiting, answered = [call["id"] for call in message.get("tool_calls", ())], False
    if answered and waiting:
        raise _unanswered(waiting)


def _unanswered(waiting: Sequence[str]) -> InputError:
    return _bad(
        "Answer tool calls",
        f"no answer to {', '.join(waiting)}",
        "one tool message for every call of the turn",
    )


def _bad(attempted: str, got: str, allowed: str) -> InputError:
    return InputError(explain(attempted, got=got, allowed=allowed))
