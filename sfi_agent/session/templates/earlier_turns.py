"""Which earlier messages the text behind an answer depends on.

The glue between two turns is looked for behind a short stand-in of what came before, since most
templates write the same there whatever that was. Some do not: they count turns, mark only the first
results, look for a switch such as `/no_think` in some message, or say the task again. What such a
template reads has to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

from sfi_agent.session.templates.message_form import Message

__all__ = ["EarlierTurns", "Tails", "split_system"]

Tails: TypeAlias = Callable[[Sequence[Message]], "tuple[str, str] | None"]
"""Text behind the answer, without and with the new messages, behind some earlier messages; None
where the template takes no such chat."""

_SHORT = "u"
_USER: Message = {"role": "user", "content": _SHORT}
_ANSWER: Message = {"role": "assistant", "content": "a"}
_CALL = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"text": "t"}}}
_OTHER_CALL = {**_CALL, "id": "call_1"}
_RESULT: Message = {"role": "tool", "name": "f", "tool_call_id": "call_0", "content": "r"}
_PASTS: tuple[tuple[Message, ...], ...] = (
    (_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, _RESULT, _ANSWER),
    (
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL, _OTHER_CALL]},
        _RESULT,
        {**_RESULT, "tool_call_id": "call_1"},
        _ANSWER,
    ),
    (_USER, _ANSWER),
    (_USER,),
)
"""Short earlier turns, with tools and without, of even and odd lengths."""


def split_system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system message, if there is one, and the others."""
    count = 1 if messages and messages[0]["role"] == "system" else 0
    return list(messages[:count]), list(messages[count:])


class EarlierTurns:
    """Chooses what stands in for the earlier messages of one template's chats.

    Args:
        opening: What a chat of this template must begin with, see `ChatTemplate`.
    """

    def __init__(self, opening: Sequence[Message]) -> None:
        self._opening = list(opening)
        # Messages of which it was seen that no later text depends on what they say.
        self._harmless: set[Hashable] = set()

    def shortest(self, earlier: Sequence[Message]) -> list[Message]:
        """The system message as it is, and a question."""
        return [*(split_system(earlier)[0] or self._opening), _USER]

    def structure_matters(self, earlier: Sequence[Message], tails: Tails) -> bool:
        """Whether the number and kinds of earlier turns change the text behind an answer."""
        shortest = self.shortest(earlier)
        usual = tails(shortest)
        for past in _PASTS:
            other = tails([*shortest[:-1], *past, _USER])
            # A template that takes no such past cannot depend on one.
            if other is not None and other != usual:
                return True
        return False

    def choose(
        self, earlier: Sequence[Message], structure_matters: bool, kind: Hashable, tails: Tails
    ) -> list[Message]:
        """As few earlier messages, as short, as the text behind this answer allows.

        Args:
            earlier: All of them.
            structure_matters: See there.
            kind: What the answer and the new messages are. What is seen for one kind holds for it.
            tails: Renders.
        """
        system, turns = split_system(earlier)
        if not turns:
            return self.shortest(earlier)
        system = system or self._opening
        if self._contents_matter(system, turns, kind, tails):
            return [*system, *turns]
        return [*system, *_outline(turns)] if structure_matters else [*system, _USER]

    def _contents_matter(
        self, system: list[Message], turns: list[Message], kind: Hashable, tails: Tails
    ) -> bool:
        keys = [(kind, *_said(message)) for message in turns]
        first = next((i for i, key in enumerate(keys) if key not in self._harmless), None)
        if first is None:
            return False
        # Each message is looked at once, with the turn that it belongs to.
        starts = [i for i in range(first + 1) if turns[i]["role"] == "user"]
        for start in dict.fromkeys((max(starts, default=0), 0)):
            said = tails([*system, *turns[start:]])
            outlined = tails([*system, *_outline(turns[start:])])
            if said is not None and outlined is not None:
                if said != outlined:
                    return True
                self._harmless.update(keys[start:])
                return False
        return False


def _said(message: Message) -> tuple[Hashable, ...]:
    """A message's role and a fingerprint of what it says."""
    said = tuple(message.get(key) for key in ("content", "reasoning_content"))
    return message["role"], hash(said)


def _outline(messages: Sequence[Message]) -> list[Message]:
    """The same roles and calls with short contents."""
    outline: list[Message] = []
    for message in messages:
        short: dict[str, Any] = {
            key: message[key] for key in ("role", "name", "tool_call_id") if key in message
        }
        short["content"] = _SHORT
        if message.get("tool_calls"):
            short["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": {"text": "t"}}}
                for call in message["tool_calls"]
            ]
        outline.append(short)
    return outline
