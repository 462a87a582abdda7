"""What a turn does to the ids of a chat, before anything has happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfi_agent.session.reply import ReuseLostReason

__all__ = ["TurnPlan"]


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
