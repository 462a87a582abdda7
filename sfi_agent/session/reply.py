"""What a turn returns: the text, the calls, why it ended, and what it cost in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from sfi_agent.errors import InputError, explain
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.events import ToolCall

__all__ = ["CancelledBy", "FinishReason", "Reply", "ReuseLostReason", "Usage", "sum_replies"]

CancelledBy = Literal["caller", "timeout"]
FinishReason = Literal["stop", "length", "tool_calls", "max_turns", "cancelled"]
ReuseLostReason = Literal[
    "template_rewrote_history",
    "tools_changed",
    "history_edited",
    "state_not_croppable",
    "model_changed",
]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one turn, or of several turns added up.

    `cached_tokens + prefilled_tokens == prompt_tokens`, always.

    Attributes:
        prompt_tokens: Length of the sequence when decoding began.
        cached_tokens: How many of them were in the history already.
        prefilled_tokens: How many had to be processed, a pending token included.
        output_tokens: Generated tokens, a stop token included.
        reasoning_tokens: How many of them were reasoning.
        reuse_lost_reason: Why part of the history was processed again; None if nothing was.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    reuse_lost_reason: ReuseLostReason | None = None

    def __post_init__(self) -> None:
        counts = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name.endswith("_tokens")
        }
        if min(counts.values()) < 0:
            raise InputError(explain("Count the tokens of a turn", got=f"{counts}", allowed=">= 0"))
        if self.cached_tokens + self.prefilled_tokens != self.prompt_tokens:
            raise InputError(
                explain(
                    "Count the tokens of a turn",
                    got=f"{counts}",
                    allowed="cached_tokens + prefilled_tokens == prompt_tokens",
                )
            )
        if self.reasoning_tokens > self.output_tokens:
            raise InputError(
                explain(
                    "Count the tokens of a turn",
                    got=f"{counts}",
                    allowed="reasoning_tokens <= output_tokens",
                )
            )

    def __add__(self, other: object) -> Usage:
        """The sum over turns; the first reason for lost reuse is kept."""
        if not isinstance(other, Usage):
            return NotImplemented
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            prefilled_tokens=self.prefilled_tokens + other.prefilled_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            reuse_lost_reason=self.reuse_lost_reason or other.reuse_lost_reason,
        )


@dataclass(frozen=True, slots=True, repr=False)
class Reply:
    """One answer of a session.

    Attributes:
        text: The answer without reasoning and without tool-call markup.
        tool_calls: Calls of the last assistant turn, in order, malformed ones included.
        reasoning: The model's reasoning; "" where it wrote none.
        usage: Tokens, summed over the turns of a run.
        finish_reason: "stop" the model ended its turn; "length" the token limit did; "tool_calls"
            it asks for tools; "max_turns" a run hit its turn limit; "cancelled" it was stopped.
        steps: One record per generated token of the answer, over all turns of a run.
        cancelled_by: What stopped it: "caller" somebody did, "timeout" its time was over; None
            where nothing did.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    usage: Usage = field(default_factory=Usage)
    finish_reason: FinishReason = "stop"
    steps: tuple[StepRecord, ...] = ()
    cancelled_by: CancelledBy | None = None

    def __repr__(self) -> str:
        parts = [repr(_shorten(self.text)), f"finish_reason={self.finish_reason!r}"]
        if self.cancelled_by:
            parts.append(f"cancelled_by={self.cancelled_by!r}")
        if self.tool_calls:
            names = ", ".join(call.name or "(malformed)" for call in self.tool_calls)
            parts.append(f"tool_calls=[{names}]")
        if self.reasoning:
            parts.append(f"reasoning={_shorten(self.reasoning)!r}")
        usage = self.usage
        parts.append(
            f"tokens={usage.cached_tokens} cached + {usage.prefilled_tokens} prefilled"
            f" + {usage.output_tokens} output"
        )
        if usage.reuse_lost_reason:
            parts.append(f"reuse_lost_reason={usage.reuse_lost_reason!r}")
        return f"Reply({', '.join(parts)})"


def sum_replies(replies: Iterable[Reply]) -> Reply:
    """The last reply, with the usage and the steps of all.

    Where a run ended between a turn's calls and the next turn, text and calls are those of that
    turn.
    """
    *earlier, last = replies
    if earlier and last == Reply("", finish_reason="cancelled", cancelled_by=last.cancelled_by):
        before = earlier.pop()
        last = replace(before, finish_reason="cancelled", cancelled_by=last.cancelled_by)
    usage, steps = last.usage, last.steps
    for reply in reversed(earlier):
        usage, steps = reply.usage + usage, reply.steps + steps
    return replace(last, usage=usage, steps=steps)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
