"""What a decoding asks of a runner, one step at a time, as plain data.

A decoding is a generator: it yields a request, is sent the outcome, and knows nothing of who else
decodes. Whoever drives it may execute the requests of many sequences together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from sfi_agent.engine.decoding_state import Choice
from sfi_agent.engine.instruments import FastAttention
from sfi_agent.engine.sampling import TokenChooser
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.observe.trace import StepRecord
from sfi_agent.protocols import Selection, Selector

__all__ = [
    "BlockStep",
    "DecodeMoves",
    "DenseStep",
    "Drawing",
    "FastStep",
    "Moves",
    "RefreshOrder",
    "RefreshStep",
    "StepOutcome",
    "StepRequest",
]


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are chosen from a step's logits.

    Attributes:
        chooser: Chooses the token of a position.
        position: Absolute position of the first token that is chosen.
        with_entropy: Whether the entropy of the distribution is wanted: of the model's own, also
            where the chooser is restricted to some tokens.
        with_logits: Whether the logits themselves are wanted, on the device.
    """

    chooser: TokenChooser
    position: int
    with_entropy: bool = False
    with_logits: bool = False


@dataclass(frozen=True, slots=True)
class RefreshOrder:
    """A refresh that follows a dense step.

    Attributes:
        selector: Asked for every sparse layer.
        segment_capacity: How many fast tokens must fit until the next refresh.
        with_selections: Whether somebody wants to see the selections.
    """

    selector: Selector
    segment_capacity: int
    with_selections: bool = False


@dataclass(frozen=True, slots=True)
class DenseStep:
    """Process tokens over the whole history, refresh, and draw what comes after the last one.

    Attributes:
        sequence: Whose tokens they are.
        ids: At least one token, behind the processed ones.
        drawing: How the next token is chosen.
        evidence_rows: How many of the newest queries the selector sees.
        refresh: What follows; None leaves the memory alone.
        flush_segment: Whether the open segment's keys and values go into the history first.
        interrupted: Asked between chunks of a long input; true ends the step early.
        may_continue: Whether the same kind of step over the drawn token is likely to follow (see
            `FastStep`).
    """

    sequence: SequenceState
    ids: Sequence[int]
    drawing: Drawing
    evidence_rows: int = 0
    refresh: RefreshOrder | None = None
    flush_segment: bool = False
    interrupted: Callable[[], bool] | None = None
    may_continue: bool = False


@dataclass(frozen=True, slots=True)
class FastStep:
    """Process one token over the memory and draw what comes after it.

    Attributes:
        sequence: Its memory is ready.
        token_id: The token.
        drawing: How the next token is chosen.
        measure_mass: Whether to measure the attention mass on the selected tokens.
        on_fast_attention: See `Instruments`.
        may_continue: Whether a fast step over the chosen token is likely to follow, so that a
            runner may begin it before anybody has looked at the token.
    """

    sequence: SequenceState
    token_id: int
    drawing: Drawing
    measure_mass: bool = False
    on_fast_attention: Callable[[FastAttention], None] | None = None
    may_continue: bool = False


@dataclass(frozen=True, slots=True)
class BlockStep:
    """Process a few tokens densely in one pass and draw behind each of them.

    Attributes:
        sequence: Its segment has been dropped.
        ids: At least one token; all query rows are kept until the next refresh.
        drawing: How tokens are chosen; row i is for `drawing.position + i`.
        continues: Whether the block goes on where the one before it ended, so that its query rows
            are kept as well.
    """

    sequence: SequenceState
    ids: Sequence[int]
    drawing: Drawing
    continues: bool = False


@dataclass(frozen=True, slots=True)
class RefreshStep:
    """Refresh from query rows that blocks have kept.

    Attributes:
        sequence: Its history ends with the token of the last row that counts.
        first_row: First kept row that the selector sees.
        stop_row: The row behind the last one it sees.
        order: See `RefreshOrder`.
    """

    sequence: SequenceState
    first_row: int
    stop_row: int
    order: RefreshOrder


StepRequest: TypeAlias = DenseStep | FastStep | BlockStep | RefreshStep


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step gave.

    Attributes:
        choices: The drawn tokens: one, or one per row of a block; none when interrupted.
        selections: Per layer what was selected, where a refresh was asked to show it.
    """

    choices: tuple[Choice, ...] = ()
    selections: list[Selection | None] | None = None

    @property
    def choice(self) -> Choice:
        return self.choices[-1]


T = TypeVar("T")
Moves: TypeAlias = Generator[StepRequest, StepOutcome, T]
"""A part of a decoding that yields requests and returns a T."""

DecodeMoves: TypeAlias = Generator[StepRequest | StepRecord, StepOutcome | None, None]
"""A whole decoding: requests are answered with outcomes, records with None."""
