"""What a caller asks of a session, its arguments checked before anything happens."""

from __future__ import annotations

from dataclasses import dataclass

from sfi_agent.errors import InputError, explain
from sfi_agent.session.arguments import at_least, positive_seconds
from sfi_agent.session.tool_use.tool_running import Approve
from sfi_agent.session.user_input import UserInput

__all__ = ["TurnRequest"]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One call of `send`, `run`, `stream` or their asynchronous twins.

    Attributes:
        action: Its name, for messages.
        message: See `Session.send`.
        max_turns: Most assistant turns of the tool loop; 0 for a single turn without tools.
        timeout_seconds: Time for the whole call; None sets no limit.
        approve: Asked before a tool runs; None lets all run.
    """

    action: str
    message: UserInput
    max_turns: int = 0
    timeout_seconds: float | None = None
    approve: Approve | None = None

    @classmethod
    def single(cls, action: str, message: UserInput, timeout_seconds: float | None) -> TurnRequest:
        """One turn.

        Raises:
            InputError: `timeout_seconds` is not usable.
        """
        seconds = positive_seconds("timeout_seconds", timeout_seconds)
        return cls(action, message, timeout_seconds=seconds)

    @classmethod
    def loop(
        cls,
        action: str,
        message: UserInput,
        max_turns: int,
        timeout_seconds: float | None,
        approve: Approve | None,
    ) -> TurnRequest:
        """Turns and tools.

        Raises:
            InputError: A number is not usable, or `approve` is no function.
        """
        most = at_least("max_turns", max_turns, 1)
        seconds = positive_seconds("timeout_seconds", timeout_seconds)
        if approve is not None and not callable(approve):
            raise InputError(
                explain("gave approve", got=repr(approve), allowed="a function, or None")
            )
        return cls(action, message, most, seconds, approve)
