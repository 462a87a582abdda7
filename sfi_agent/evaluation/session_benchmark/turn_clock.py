"""One turn of a session, timed until its first token and until its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfi_agent.evaluation.session_benchmark.records import Timing, TurnCost
from sfi_agent.session.events import Step, TurnEnd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfi_agent.evaluation.session_benchmark.stopwatch import Stopwatch
    from sfi_agent.session.reply import Reply
    from sfi_agent.session.session import Session
    from sfi_agent.session.user_input import UserInput

__all__ = ["TimedTurn", "timed_turn", "turn_cost"]


@dataclass(frozen=True, slots=True)
class TimedTurn:
    """What a turn took.

    Attributes:
        reply: What came out of it.
        new_tokens: Ids that it brought, and the one that was pending before it.
        first_token_seconds: Until the first token.
        seconds: Until its end.
    """

    reply: Reply
    new_tokens: int
    first_token_seconds: float
    seconds: float


def timed_turn(session: Session, message: UserInput, watch: Stopwatch) -> TimedTurn:
    """Play one turn as a program would that shows the answer while it is written."""
    present = len(session.token_ids)
    first: float | None = None
    reply: Reply | None = None
    started = watch.now()
    for event in session.stream(message, max_turns=1):
        if isinstance(event, Step) and first is None:
            first = watch.now()
        elif isinstance(event, TurnEnd):
            reply = event.reply
    ended = watch.now()
    assert first is not None and reply is not None, "a turn has a token and an end"
    new_tokens = reply.usage.prompt_tokens - max(0, present - 1)
    return TimedTurn(reply, new_tokens, first - started, ended - started)


def turn_cost(turns: Sequence[TimedTurn]) -> TurnCost:
    """The same turn, several times; tokens are those of the one that processed most anew."""
    worst = max(turns, key=lambda turn: turn.reply.usage.prefilled_tokens - turn.new_tokens)
    return TurnCost(
        worst.reply.usage,
        worst.new_tokens,
        Timing.of([turn.first_token_seconds for turn in turns]),
        Timing.of([turn.seconds for turn in turns]),
    )
