"""Which ids bring new messages into a conversation. Nothing here changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, explain
from sfi_agent.session.events import ToolCall
from sfi_agent.session.reply import ReuseLostReason
from sfi_agent.session.templates.chat_delta import ChatDelta
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.dropped_reasoning import (
    RewrittenChat,
    dropped_reasoning,
    rewrite_chat,
)
from sfi_agent.session.templates.history_match import common_prefix, describe_difference
from sfi_agent.session.templates.volatile_prompt import clocks_in_prompt
from sfi_agent.session.transcript import Transcript
from sfi_agent.session.turn_plan import TurnPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TurnPlanner"]

# Of the prompt's end: enough to see how the template begins the model's message.
_LEAST_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class TurnPlanner:
    """Plans the turns of one chat, from what it is given alone: forks share it.

    Attributes:
        tokenizer: Of the template.
        template: Renders whole conversations.
        delta: Continues them.
        system_messages: The session's own, one or none.
        with_tools: Whether the session has tools.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    delta: ChatDelta
    system_messages: tuple[dict[str, Any], ...]
    with_tools: bool

    def first(self, messages: tuple[dict[str, Any], ...], *, clocks_are_told: bool) -> TurnPlan:
        """The first turn.

        Args:
            messages: What is sent, checked.
            clocks_are_told: Whether nobody needs to hear of clocks in the prompt any more.

        Raises:
            InputError: There would be two system messages.
            TemplateError: The template cannot render them.
        """
        if self.system_messages and messages[0]["role"] == "system":
            raise InputError(
                explain(
                    "sent a system message into a session that has a system prompt",
                    remedy="give it either to engine.session(system=...) or as first message",
                )
            )
        if messages[0]["role"] == "system":
            self.template.require_system()
            if self.with_tools:
                self.template.require_tools(beside_system=True)
        whole = (*self.system_messages, *messages)
        ids = self.template.first_prompt(whole)
        self.template.require_contents(whole, len(messages))
        clocks = () if clocks_are_told else clocks_in_prompt(self.template, whole)
        return TurnPlan(0, ids, whole, self._text(ids), clocks=clocks)

    def next(
        self,
        transcript: Transcript,
        messages: tuple[dict[str, Any], ...],
        answered: Sequence[ToolCall],
        *,
        drops_reasoning: bool,
    ) -> TurnPlan:
        """A later turn.

        Args:
            transcript: The conversation so far.
            messages: What is sent, checked, answers to calls first.
            answered: Calls that they answer.
            drops_reasoning: Whether earlier reasoning becomes what the template makes of it.

        Raises:
            TemplateError: The template cannot render them.
        """
        edited: ReuseLostReason | None = None
        if not transcript.ends_with_output:
            # A rewind into a prompt left no assistant turn that a delta could continue.
            edited = "history_edited"
        elif drops_reasoning and any(item["role"] == "user" for item in messages):
            rewritten = rewrite_chat(self.template, transcript, messages)
            if rewritten is not None:
                return self._without_reasoning(transcript, rewritten, messages)
        found = self.delta.continue_chat(
            transcript.token_ids, transcript.messages, messages, answered, rerender_reason=edited
        )
        lost = found.reuse_lost_reason is not None
        whole = [*transcript.messages, *messages]
        joins = self.template.form.one_call_per_turn and len(answered) > 1 and not lost
        return TurnPlan(
            found.kept_tokens,
            found.new_ids,
            messages,
            self._prompt_end(transcript, found.kept_tokens, found.new_ids),
            found.reuse_lost_reason,
            found.detail,
            rerendered=lost,
            dropped=dropped_reasoning(self.template, whole) if lost else (),
            joined_calls=len(answered) if joins else 0,
        )

    def anew(self, before: Sequence[int], messages: Sequence[dict[str, Any]]) -> TurnPlan:
        """Another conversation in place of one whose ids are `before`.

        Raises:
            TemplateError: The template cannot render it.
        """
        ids = self.template.first_prompt(messages)
        kept = min(common_prefix(before, ids), len(ids) - 1)
        lost = kept < len(before) - 1
        return TurnPlan(
            kept,
            ids[kept:],
            tuple(messages),
            self._text(ids),
            "history_edited" if lost else None,
            describe_difference(self.tokenizer, before, ids) if lost else "",
            replaces=True,
        )

    def _without_reasoning(
        self,
        transcript: Transcript,
        rewritten: RewrittenChat,
        messages: tuple[dict[str, Any], ...],
    ) -> TurnPlan:
        return TurnPlan(
            rewritten.kept_tokens,
            rewritten.new_ids,
            messages,
            self._prompt_end(transcript, rewritten.kept_tokens, rewritten.new_ids),
            "template_rewrote_history",
            rewritten.detail,
            rerendered=True,
            dropped=rewritten.dropped,
        )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _prompt_end(self, transcript: Transcript, kept_tokens: int, new_ids: Sequence[int]) -> str:
        """Text of the new ids, and of some before them where they are few."""
        ids = transcript.token_ids[:kept_tokens]
        return self._text([*ids[len(ids) - min(len(ids), _LEAST_PROMPT_TOKENS) :], *new_ids])
