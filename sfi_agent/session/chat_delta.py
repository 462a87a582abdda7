"""New messages as ids that continue the model's own raw output, without rendering history again.

Ids are the truth: what the model wrote is kept as it sampled it, and only the glue after it and
the new messages are rendered, behind a short stand-in chat whose assistant message holds a random
marker. What follows the last marker, with and without the new messages, shows how the template
closes an assistant turn and what comes next. Whatever cannot be proven that way is refused, and
the whole chat is rendered instead; the longest common prefix of ids is then kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfi_agent.session.chat_template import ChatTemplate, Message, RenderFailure, probe_text
from sfi_agent.session.events import ToolCall
from sfi_agent.session.history_match import common_prefix, describe_difference
from sfi_agent.session.reply import ReuseLostReason

__all__ = ["ChatDelta", "Continuation", "Delta", "DeltaRefused", "Requirement"]

Requirement = Literal[
    "renders",
    "marker_is_rendered",
    "close_does_not_depend_on_what_follows",
    "contents_are_rendered",
    "begins_with_control_token",
    "closes_with_a_stop_token",
]


class DeltaRefused(Exception):
    """A delta cannot be proven right. Internal: the caller renders the whole chat instead.

    Attributes:
        requirement: Which requirement of the method failed.
    """

    def __init__(self, requirement: Requirement, detail: str) -> None:
        super().__init__(detail)
        self.requirement = requirement


@dataclass(frozen=True, slots=True)
class Delta:
    """Ids to append to a history that ends with the model's own output.

    Attributes:
        ids: The ids to append.
        replaces_last: The model stopped on another stop token than the template writes: the last
            id of the history, whose keys and values do not exist yet, gives way to `ids[0]`.
    """

    ids: tuple[int, ...]
    replaces_last: bool


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a history goes on.

    Attributes:
        kept_tokens: Ids of the history that stay.
        new_ids: Ids that come after them, at least one.
        reuse_lost_reason: Why ids that were processed before are not kept; None if all are.
        detail: The same for a log: the requirement that failed, and the first difference.
    """

    kept_tokens: int
    new_ids: tuple[int, ...]
    reuse_lost_reason: ReuseLostReason | None = None
    detail: str = ""


class ChatDelta:
    """Continues chats of one template.

    Args:
        template: The template with the session's tools and options.
        stop_ids: Tokens that end the model's turn, see `stop_ids`.
    """

    def __init__(self, template: ChatTemplate, stop_ids: frozenset[int]) -> None:
        self._template = template
        self._stop_ids = stop_ids
        self._stop_texts = tuple(
            text for text, index in template.control_tokens.ids.items() if index in stop_ids
        )
        self._proven_shapes: set[tuple[tuple[str, bool], ...]] = set()

    def delta(
        self, new_messages: Sequence[Message], calls: Sequence[ToolCall], last_id: int
    ) -> Delta:
        """The ids that bring new messages, up to where the model goes on.

        Args:
            new_messages: What follows the assistant turn; all results of a tool round at once.
            calls: The calls of that turn that the new messages answer; empty otherwise.
            last_id: The last id of the history: a stop token, or any other one where the turn was
                cut short; then the template's close is appended whole.

        Raises:
            DeltaRefused: Some requirement does not hold for this template and these messages.
        """
        tail, close = self._tails(new_messages, calls)
        self._require_contents(new_messages, calls)
        suffix = tail[close:]
        if self._template.control_tokens.first(suffix) is None:
            raise DeltaRefused("begins_with_control_token", f"it begins with {suffix[:20]!r}")
        ids = tuple(self._template.encode(suffix))
        if last_id not in self._stop_ids:
            return Delta(ids, replaces_last=False)
        if ids[0] == last_id:
            return Delta(ids[1:], replaces_last=False)
        if ids[0] in self._stop_ids:
            return Delta(ids, replaces_last=True)
        raise DeltaRefused(
            "closes_with_a_stop_token",
            f"the turn ended on token {last_id}, the template goes on with {ids[0]}",
        )

    def continue_chat(
        self,
        history_ids: Sequence[int],
        messages: Sequence[Message],
        new_messages: Sequence[Message],
        calls: Sequence[ToolCall] = (),
        *,
        rerender_reason: ReuseLostReason | None = None,
    ) -> Continuation:
        """Append by delta where it can be proven, otherwise render the whole chat again.

        Args:
            history_ids: All ids so far, at least one.
            messages: The chat so far, as messages.
            new_messages: What follows.
            calls: The calls of the last assistant turn that `new_messages` answer.
            rerender_reason: Render the whole chat without trying a delta, for this reason.

        Raises:
            TemplateError: The template cannot render the chat at all.
        """
        detail = ""
        if rerender_reason is None:
            try:
                delta = self.delta(new_messages, calls, history_ids[-1])
            except DeltaRefused as refusal:
                detail = f"{refusal.requirement}: {refusal}"
            else:
                return Continuation(len(history_ids) - delta.replaces_last, delta.ids)
        reason = rerender_reason or "template_rewrote_history"
        ids = self._template.first_prompt([*messages, *new_messages])
        # At least one id is fed, or there would be no logits to go on from.
        kept = min(common_prefix(history_ids, ids), len(ids) - 1)
        if kept >= len(history_ids) - 1:
            return Continuation(kept, ids[kept:], None, detail)
        difference = describe_difference(self._template.tokenizer, history_ids, ids)
        detail = f"{detail}; {difference}" if detail else difference
        return Continuation(kept, ids[kept:], reason, detail)

    def _tails(self, new_messages: Sequence[Message], calls: Sequence[ToolCall]) -> tuple[str, int]:
        """Text after the marker with the new messages, and where in it the close begins."""
        problem = DeltaRefused("marker_is_rendered", "the template shows no assistant message")
        for marker, head in self._heads(calls, _marker_outside(new_messages)):
            try:
                before = self._template.render(head, generation_prompt=False)
                after = self._template.render([*head, *new_messages], generation_prompt=True)
            except RenderFailure as failure:
                problem = DeltaRefused("renders", str(failure))
                continue
            if marker not in before or marker not in after:
                continue
            tail_before = before.rpartition(marker)[2]
            tail_after = after.rpartition(marker)[2]
            if not tail_after.startswith(tail_before):
                raise DeltaRefused(
                    "close_does_not_depend_on_what_follows",
                    f"{tail_before[-30:]!r} becomes {tail_after[: len(tail_before)][-30:]!r}",
                )
            return tail_after, self._close_start(tail_before)
        raise problem

    def _close_start(self, tail: str) -> int:
        # Before the last end-of-turn token stands markup of the calls, which the model has written
        # itself. Some families have no such token: the next turn's role closes this one.
        starts = [tail.rfind(text) for text in self._stop_texts]
        found = max(starts, default=-1)
        return found if found >= 0 else len(tail)

    def _heads(
        self, calls: Sequence[ToolCall], marker: str
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Stand-in chats: the marker as text, then, for templates that show no text beside a
        call, as an argument of the last call."""
        user = {"role": "user", "content": "u"}
        answered = calls[:1] if self._template.form.one_call_per_turn else calls
        assistant: dict[str, Any] = {"role": "assistant", "content": marker}
        if not answered:
            yield marker, [user, assistant]
            return
        plain = [_stand_in(call, "t") for call in answered]
        yield marker, [user, {**assistant, "tool_calls": plain}]
        marked = [*plain[:-1], _stand_in(answered[-1], marker)]
        yield marker, [user, {**assistant, "content": "", "tool_calls": marked}]

    def _require_contents(self, messages: Sequence[Message], calls: Sequence[ToolCall]) -> None:
        """Some templates leave out roles they do not know: prove it once per sequence of roles."""
        shape = tuple((str(item["role"]), bool(item.get("tool_calls"))) for item in messages)
        if shape in self._proven_shapes:
            return
        probes, chat = [], []
        for message in messages:
            if message.get("tool_calls"):
                chat.append(dict(message))
                continue
            probes.append(probe_text())
            chat.append({**message, "content": probes[-1]})
        _, head = next(self._heads(calls, probe_text()))
        try:
            text = self._template.render([*head, *chat], generation_prompt=True)
        except RenderFailure as failure:
            raise DeltaRefused("renders", str(failure)) from failure
        missing = [role for (role, _), probe in _pairs(shape, probes) if probe not in text]
        if missing:
            raise DeltaRefused("contents_are_rendered", f"messages of role {missing[0]} vanish")
        self._proven_shapes.add(shape)


def _marker_outside(messages: Sequence[Message]) -> str:
    """A marker that no message quotes, which would move the cut."""
    text = repr(messages)
    while (marker := probe_text()) in text:
        pass
    return marker


def _pairs(
    shape: Sequence[tuple[str, bool]], probes: Sequence[str]
) -> Iterator[tuple[tuple[str, bool], str]]:
    return zip((item for item in shape if not item[1]), probes, strict=True)


def _stand_in(call: ToolCall, value: str) -> Mapping[str, Any]:
    function = {"name": call.name or "unknown", "arguments": {"text": value}}
    return {"id": call.id, "type": "function", "function": function}
