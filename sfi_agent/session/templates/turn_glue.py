"""What a chat template writes between an assistant's turn and the model's next one.

The template is given a short stand-in chat whose assistant message holds a random marker, with and
without the new messages behind it. What follows the last marker shows how an assistant turn is
closed and what comes next; text before it may differ and does not matter. Whatever cannot be proven
that way is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

from sfi_agent.session.events import ToolCall
from sfi_agent.session.templates.chat_template import (
    ChatTemplate,
    Message,
    RenderFailure,
    probe_text,
)
from sfi_agent.session.templates.earlier_turns import EarlierTurns, Tails, split_system

__all__ = ["DeltaRefused", "Glue", "Requirement", "TurnGlue"]

Requirement = Literal[
    "renders",
    "marker_is_rendered",
    "does_not_depend_on_the_answer",
    "close_does_not_depend_on_what_follows",
    "contents_are_rendered",
    "begins_with_control_token",
    "closes_with_a_stop_token",
]


_NO_ANSWER: Literal["does_not_depend_on_the_answer"] = "does_not_depend_on_the_answer"


class DeltaRefused(Exception):
    """A delta cannot be proven right. Internal: the caller renders the whole chat instead.

    Attributes:
        requirement: Which requirement of the method failed.
    """

    def __init__(self, requirement: Requirement, detail: str) -> None:
        super().__init__(detail)
        self.requirement = requirement


@dataclass(frozen=True, slots=True)
class Glue:
    """Rendered text behind the model's own output.

    Attributes:
        lead: What the template writes in front of the close, such as the end of a channel; a model
            that ends its turn by itself has written it. "" behind calls: that is their markup.
        text: From the close on: the close, the new messages, and the opening of the model's turn.
    """

    lead: str
    text: str


@dataclass(frozen=True, slots=True)
class _Head:
    """A stand-in assistant message with the marker that it holds, and what its calls say."""

    marker: str
    assistant: Mapping[str, Any]
    value: str = ""


class TurnGlue:
    """Finds the glue of one template.

    Args:
        template: The template with the session's tools and options.
        stop_texts: Tokens that end the model's turn, as text.
    """

    def __init__(self, template: ChatTemplate, stop_texts: frozenset[str]) -> None:
        self._template = template
        self._stop_texts = stop_texts
        self._earlier = EarlierTurns(template.opening)
        self._proven: dict[Hashable, bool] = {}

    def find(
        self,
        new_messages: Sequence[Message],
        calls: Sequence[ToolCall] = (),
        earlier: Sequence[Message] = (),
        answer: Message | None = None,
    ) -> Glue:
        """The glue that brings new messages.

        Args:
            new_messages: What follows the assistant turn; all results of a tool round at once.
            calls: The calls of that turn that the new messages answer; empty otherwise.
            earlier: The messages before that turn, for templates whose glue depends on them.
            answer: The assistant's message, where it is known and has no calls.

        Raises:
            DeltaRefused: Some requirement does not hold for this template and these messages.
        """
        problem: DeltaRefused | None = None
        for number, head in enumerate(self._heads(calls, _marker_outside(new_messages))):
            try:
                depends = self._prove(number, new_messages, calls, earlier)
                tails = self._tails_or_none(head, new_messages)
                before = self._earlier.choose(earlier, depends, (number, bool(calls)), tails)
                glue = self._split(*self._tails(before, head, new_messages), bool(calls))
                if head.value and head.value in glue.text:
                    raise DeltaRefused(_NO_ANSWER, "calls are shown again later")
                self._check_answer(glue, before, answer, new_messages)
                return glue
            except DeltaRefused as refusal:
                if refusal.requirement == _NO_ANSWER:
                    raise
                problem = problem or refusal
        assert problem is not None
        raise problem

    def _check_answer(
        self, glue: Glue, before: Sequence[Message], answer: Message | None, new: Sequence[Message]
    ) -> None:
        """The same stands behind what the model really said: it may have said a word that a
        template looks for."""
        if answer is None or answer.get("tool_calls") or not str(answer["content"]).strip():
            return
        try:
            text = self._template.render([*before, answer, *new], generation_prompt=True)
        except RenderFailure as failure:
            raise DeltaRefused("renders", str(failure)) from failure
        if not text.endswith(glue.text):
            raise DeltaRefused(_NO_ANSWER, "other text stands behind this answer")

    def _heads(self, calls: Sequence[ToolCall], marker: str) -> Iterator[_Head]:
        """The marker as text, then, for templates that show no text beside a call or show it
        elsewhere, as an argument of the last call."""
        answered = calls[:1] if self._template.form.one_call_per_turn else calls
        assistant: dict[str, Any] = {"role": "assistant", "content": marker}
        if not answered:
            yield _Head(marker, assistant)
            return
        value = probe_text()
        plain = [_stand_in(call, value) for call in answered]
        yield _Head(marker, {**assistant, "tool_calls": plain}, value)
        marked = [*plain[:-1], _stand_in(answered[-1], marker)]
        yield _Head(marker, {**assistant, "content": "", "tool_calls": marked}, value)

    def _prove(
        self,
        number: int,
        messages: Sequence[Message],
        calls: Sequence[ToolCall],
        earlier: Sequence[Message],
    ) -> bool:
        """Prove once per kind of head and sequence of roles that the contents come after the
        marker: some templates leave out roles they do not know. Gives back whether the glue
        depends on the number and kinds of earlier turns."""
        shape = tuple((str(item["role"]), bool(item.get("tool_calls"))) for item in messages)
        system = tuple(str(message["content"]) for message in split_system(earlier)[0])
        key = (number, len(calls), shape, system)
        if key in self._proven:
            return self._proven[key]
        probes: list[str] = []
        chat: list[Message] = []
        for message in messages:
            if not message.get("tool_calls"):
                probes.append(probe_text())
                message = {**message, "content": probes[-1]}
            chat.append(message)
        head = list(self._heads(calls, probe_text()))[number]
        _, tail = self._tails(self._earlier.shortest(earlier), head, chat)
        for probe, role in zip(probes, (role for role, made in shape if not made), strict=True):
            if probe not in tail:
                raise DeltaRefused("contents_are_rendered", f"messages of role {role} vanish")
        tails = self._tails_or_none(head, chat)
        self._proven[key] = self._earlier.structure_matters(earlier, tails)
        return self._proven[key]

    def _tails_or_none(self, head: _Head, new: Sequence[Message]) -> Tails:
        def tails(earlier: Sequence[Message]) -> tuple[str, str] | None:
            try:
                return self._tails(earlier, head, new)
            except DeltaRefused as refusal:
                return None if refusal.requirement == "renders" else ("", refusal.requirement)

        return tails

    def _tails(
        self, earlier: Sequence[Message], head: _Head, new: Sequence[Message]
    ) -> tuple[str, str]:
        """Text after the marker, without and with the new messages."""
        chat, marker = [*earlier, head.assistant], head.marker
        try:
            before = self._template.render(chat, generation_prompt=False)
            after = self._template.render([*chat, *new], generation_prompt=True)
        except RenderFailure as failure:
            raise DeltaRefused("renders", str(failure)) from failure
        if marker not in before or marker not in after:
            raise DeltaRefused("marker_is_rendered", "the template shows no assistant message")
        if before.count(marker) != after.count(marker):
            raise DeltaRefused(_NO_ANSWER, "the answer is shown again later")
        return before.rpartition(marker)[2], after.rpartition(marker)[2]

    def _split(self, before: str, after: str, after_calls: bool) -> Glue:
        start = self._close_start(before, after, after_calls=after_calls)
        if self._template.control_tokens.first(after[start:]) is None:
            shown = self._template.control_tokens.plain(after[start:])[:20]
            raise DeltaRefused("begins_with_control_token", f"it begins with {shown!r}")
        return Glue("" if after_calls else after[:start], after[start:])

    def _close_start(self, before: str, after: str, *, after_calls: bool) -> int:
        """Where the close begins. In front of it stands markup that the model writes itself."""
        shared = len(commonprefix([before, after]))
        tokens = list(self._template.control_tokens.spans(before))
        stops = [start for start, text in tokens if text in self._stop_texts]
        kept = [start for start, text in tokens if start in stops and start + len(text) <= shared]
        if kept:
            # Behind calls the last one: their markup may hold others. Behind text the first one.
            return kept[-1] if after_calls else kept[0]
        if stops:
            # The end of a chat is closed otherwise than a turn inside it. What is written inside
            # counts; it must stand at the same place.
            if stops[0] <= shared and self._template.control_tokens.first(after[stops[0] :]):
                return stops[0]
        elif shared == len(before):
            return self._without_stop(tokens, len(before), after_calls=after_calls)
        plain = self._template.control_tokens.plain
        raise DeltaRefused(
            "close_does_not_depend_on_what_follows",
            f"{plain(before)[-30:]!r} becomes {plain(after)[: len(before)][-30:]!r}",
        )

    def _without_stop(
        self, tokens: Sequence[tuple[int, str]], length: int, *, after_calls: bool
    ) -> int:
        """The template writes none of the stop tokens: the next role closes the turn, or the model
        stops on something that the template does not know."""
        special = self._template.control_tokens.special_texts
        closes = [start for start, text in tokens if text in special]
        if not closes:
            return length
        if after_calls or len(closes) > 1:
            raise DeltaRefused("closes_with_a_stop_token", "no token of the close is one")
        return closes[0]


def _stand_in(call: ToolCall, value: str) -> Mapping[str, Any]:
    function = {"name": call.name or "unknown", "arguments": {"text": value}}
    return {"id": call.id, "type": "function", "function": function}


def _marker_outside(messages: Sequence[Message]) -> str:
    """A marker that no message quotes, which would move the cut."""
    text = repr(messages)
    while (marker := probe_text()) in text:
        pass
    return marker
