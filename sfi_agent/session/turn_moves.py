"""What a turn asks of whoever drives it.

A turn is a generator, so that one way of taking turns serves callers that wait in their own thread
and callers in an event loop. It yields events, and what it needs: a step of the model (answered
with a `StepOutcome`), an errand (answered with what its function gave), or tools to be run (a
`ToolRound`; answered with None). Closing it, at any of these places, ends the turn and leaves the
session consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from sfi_agent.engine.requests import StepRequest
from sfi_agent.session.events import Event
from sfi_agent.session.tool_use.tool_round import ToolRound

__all__ = ["Errand", "TurnMove", "TurnMoves"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Errand:
    """Work without the model that may take a while, such as rendering and tokenizing."""

    work: Callable[[], Any]


TurnMove: TypeAlias = StepRequest | Errand | ToolRound | Event
TurnMoves: TypeAlias = Generator[TurnMove, Any, T]
"""A part of a turn that returns a T."""
