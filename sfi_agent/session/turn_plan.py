"""What a turn does to the ids of a chat, before anything has happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfi_agent.observe.log import log_event
from sfi_agent.session.reply import ReuseLostReason

__all__ = ["TurnPlan", "warn_of_joined_calls"]


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """What a turn does to the ids; nothing has happened yet.

    Attributes:
        kept_tokens: Present ids that stay.
        new_ids: Ids behind them, at least one.
        messages: The new messages.
        prompt_text: End of the prompt as text, for the reader of the output.
        reuse_lost_reason: Why processed ids are given up, None if none are.
        detail: The same for the log.
        replaces: Whether `messages` stand for the whole conversation, also for what was before.
        rerendered: Whether the ids are those of the whole conversation, rendered again.
        dropped: Messages whose reasoning the ids do not hold any more, by index.
        clocks: What makes the beginning of the prompt depend on the time, not told before.
        joined_calls: How many results follow each other though the template shows one call per
            turn; 0 where it shows several, and where it was told before.
    """

    kept_tokens: int
    new_ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...]
    prompt_text: str
    reuse_lost_reason: ReuseLostReason | None = None
    detail: str = ""
    replaces: bool = False
    rerendered: bool = False
    dropped: tuple[int, ...] = ()
    clocks: tuple[str, ...] = ()
    joined_calls: int = 0


def warn_of_joined_calls(session_id: str, plan: TurnPlan) -> None:
    """Log that a turn holds more calls than the template knows, if it does."""
    if plan.joined_calls:
        log_event(
            "warning",
            "several_calls_in_one_turn",
            session=session_id,
            calls=plan.joined_calls,
            remedy="The chat template shows one call per turn: the calls stay as the model wrote "
            "them and their results follow one another. Tell the model to make one call at a time",
        )
