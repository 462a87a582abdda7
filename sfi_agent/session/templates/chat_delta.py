"""New messages as ids that continue the model's own raw output, without rendering history again.

Ids are the truth: what the model wrote is kept as it sampled it, and only the glue after it and
the new messages are rendered (`turn_glue.py`). Where that cannot be proven right, the whole chat
is rendered instead, and the longest common prefix of ids is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.session.events import ToolCall
from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.templates.chat_template import ChatTemplate, Message
from sfi_agent.session.templates.history_match import common_prefix, describe_difference
from sfi_agent.session.templates.turn_glue import DeltaRefused, Requirement, TurnGlue

__all__ = ["ChatDelta", "Continuation", "Delta", "DeltaRefused", "Requirement"]


@dataclass(frozen=True, slots=True)
class Delta:
    """Ids to append to a history that ends with the model's own output.

    Attributes:
        ids: The ids to append.
        replaces_last: The model stopped on another token than the template writes there: the last
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
        texts = (text for text, index in template.control_tokens.ids.items() if index in stop_ids)
        self._glue = TurnGlue(template, frozenset(texts))

    def delta(
        self,
        new_messages: Sequence[Message],
        calls: Sequence[ToolCall],
        history_ids: Sequence[int],
        earlier: Sequence[Message] = (),
        answer: Message | None = None,
    ) -> Delta:
        """The ids that bring new messages, up to where the model goes on.

        Args:
            new_messages: What follows the assistant turn; all results of a tool round at once.
            calls: The calls of that turn that the new messages answer; empty otherwise.
            history_ids: The history, or its end: its last id is a stop token, or any other one
                where the turn was cut short; then the template's close is appended whole.
            earlier: The messages before the assistant turn, for templates whose text between turns
                depends on them.
            answer: The assistant's message, where it is known.

        Raises:
            DeltaRefused: Some requirement does not hold for this template and these messages.
        """
        glue = self._glue.find(new_messages, calls, earlier, answer)
        ids = tuple(self._template.encode(glue.text))
        last_id = history_ids[-1]
        if ids[0] == last_id and last_id in self._stop_ids:
            return Delta(ids[1:], replaces_last=False)
        replaces = last_id in self._stop_ids
        written = history_ids[:-1] if replaces else history_ids
        return Delta((*self._missing_lead(glue.lead, written), *ids), replaces_last=replaces)

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
            TemplateError: The template cannot render the chat at all, or leaves a new message out.
        """
        detail = ""
        if rerender_reason is None:
            try:
                delta = self.delta(new_messages, calls, history_ids, messages[:-1], messages[-1])
            except DeltaRefused as refusal:
                detail = f"{refusal.requirement}: {refusal}"
            else:
                return Continuation(len(history_ids) - delta.replaces_last, delta.ids)
        reason = rerender_reason or "template_rewrote_history"
        whole = [*messages, *new_messages]
        ids = self._template.first_prompt(whole)
        self._template.require_contents(whole, len(new_messages))
        # At least one id is fed, or there would be no logits to go on from.
        kept = min(common_prefix(history_ids, ids), len(ids) - 1)
        if kept >= len(history_ids) - 1:
            return Continuation(kept, ids[kept:], None, detail)
        difference = describe_difference(self._template.tokenizer, history_ids, ids)
        detail = f"{detail}; {difference}" if detail else difference
        return Continuation(kept, ids[kept:], reason, detail)

    def _missing_lead(self, lead: str, history_ids: Sequence[int]) -> list[int]:
        """What the model has not written of that which stands in front of the close: its turn was
        cut short, or it stopped on a token that the template does not write."""
        if not lead:
            return []
        ids = [index for index in history_ids[-2 * len(lead) :] if index >= 0]
        written = str(
            self._template.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        tokens = self._template.control_tokens
        inside = {
            start + offset for start, text in tokens.spans(lead) for offset in range(1, len(text))
        }
        begun = [
            length
            for length in range(len(lead) + 1)
            if length not in inside and written.endswith(lead[:length])
        ]
        return tokens.encode_inside(lead[max(begun) :])
