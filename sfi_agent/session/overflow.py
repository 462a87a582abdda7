"""Conversations that outgrow the model's context: what a hook is told, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sfi_agent.errors import InputError, explain
from sfi_agent.session.arguments import at_least
from sfi_agent.session.user_input import normalise_messages

if TYPE_CHECKING:
    from sfi_agent.session.session import Session

__all__ = [
    "Overflow",
    "OverflowHook",
    "OverflowPolicy",
    "ask_hook",
    "checked_messages",
    "checked_policy",
    "drop_oldest_turns",
    "hook_is_asked",
]

Messages: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Overflow:
    """A turn that does not fit, as a hook sees it.

    Attributes:
        needed_tokens: Length of the prompt, with the room that its answer is to have.
        limit_tokens: Longest sequence of the model.
        messages: The conversation with the new messages at its end (copies).
        session: To look at: forks, marks and views work, everything else is `SessionBusy`.
    """

    needed_tokens: int
    limit_tokens: int
    messages: tuple[Mapping[str, Any], ...]
    session: Session
    _measure: Callable[[Messages], int] = field(repr=False, compare=False)

    def tokens_needed_for(self, messages: Messages) -> int:
        """What `needed_tokens` would be with these messages instead.

        Raises:
            TemplateError: The chat template cannot render them.
        """
        return self._measure(messages)


OverflowHook: TypeAlias = Callable[[Overflow], Messages]
"""Gives the messages to go on with, or raises."""

OverflowPolicy: TypeAlias = "Literal['error'] | OverflowHook"


def checked_policy(given: object) -> OverflowPolicy:
    """What a session does about overflows, if it is usable.

    Raises:
        InputError: It is neither "error" nor a function.
    """
    if callable(given) or (isinstance(given, str) and given == "error"):
        return given  # type: ignore[return-value]
    raise InputError(
        explain(
            "opened a session with an overflow that is unknown",
            got=f"overflow={given!r}",
            allowed="'error', or a function that takes an Overflow and returns messages",
        )
    )


_asking: ContextVar[bool] = ContextVar("sfi_agent_asks_overflow_hook", default=False)


def ask_hook(hook: OverflowHook, overflow: Overflow) -> Messages:
    """What a hook answers."""
    token = _asking.set(True)
    try:
        return hook(overflow)
    finally:
        _asking.reset(token)


def hook_is_asked() -> bool:
    """Whether a hook is being asked in this context."""
    return _asking.get()


def drop_oldest_turns(*, keep_turns: int = 4) -> OverflowHook:
    """A hook that forgets the oldest turns: a user message with everything up to the next.

    System message and tools stay, and so does the newest turn, whole. A conversation whose newest
    turn alone does not fit raises `ContextOverflowError`.

    Args:
        keep_turns: How many of the newest turns stay; fewer where these do not fit.

    Raises:
        InputError: `keep_turns` is no integer of at least 1.
    """
    most = at_least("keep_turns", keep_turns, 1)

    def hook(overflow: Overflow) -> Messages:
        messages = overflow.messages
        system = 1 if messages[0]["role"] == "system" else 0
        starts = [max(start, system) for start in _turn_starts(messages)]
        for start in starts[-most:-1]:
            kept = [*messages[:system], *messages[start:]]
            if overflow.tokens_needed_for(kept) <= overflow.limit_tokens:
                return kept
        return [*messages[:system], *messages[starts[-1] :]]

    return hook


def checked_messages(given: Any, before: Messages) -> tuple[dict[str, Any], ...]:
    """What a hook gave, if a conversation can go on with it.

    Args:
        given: Messages.
        before: The conversation that did not fit.

    Raises:
        InputError: They are no conversation, a call or a result would be without its other half,
            or the system message is gone.
    """
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise _refused(repr(given), "a list of messages")
    messages = normalise_messages(deepcopy(list(given)))
    for call_id in _unanswered(messages):
        if call_id not in _unanswered(before):
            raise _refused(
                f"the call {call_id} without its result", "calls together with their results"
            )
    if before[0]["role"] == "system" != messages[0]["role"]:
        raise _refused("no system message", "a system message first, as there was before")
    return messages


def _turn_starts(messages: Messages) -> Iterator[int]:
    """Where the conversation can be cut: before user messages behind which no earlier call is
    answered. The first start is 0."""
    answered_at = {
        message.get("tool_call_id"): index
        for index, message in enumerate(messages)
        if message["role"] == "tool"
    }
    yield 0
    open_until = -1
    seen_user = False
    for index, message in enumerate(messages):
        if message["role"] == "user":
            if seen_user and index > open_until:
                yield index
            seen_user = True
        for call in message.get("tool_calls", ()):
            open_until = max(open_until, answered_at.get(call["id"], -1))


def _unanswered(messages: Messages) -> list[str]:
    """Calls that no later message answers."""
    waiting: list[str] = []
    for message in messages:
        waiting += [call["id"] for call in message.get("tool_calls", ())]
        if message["role"] == "tool" and message.get("tool_call_id") in waiting:
            waiting.remove(message["tool_call_id"])
    return waiting


def _refused(got: str, allowed: str) -> InputError:
    return InputError(
        explain("shortened a conversation that does not fit", got=got, allowed=allowed)
    )
