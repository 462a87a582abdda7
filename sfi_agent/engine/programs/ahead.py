"""Steps that are begun before anybody has looked at the tokens they process.

The tokens are on the device already, so the device need not wait for the host to read them and ask
the detectors. If a boundary, a retry or a stop says otherwise, what was begun is left alone: it
wrote behind the end of everything, and nobody reads there. So nothing depends on whether it
happened, and where it happened in vain too often, it is not done for a while.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.engine.programs.cohort import Cohort
from sfi_agent.engine.programs.control import CHAINED
from sfi_agent.engine.programs.program import PendingStep, StepProgram
from sfi_agent.engine.programs.slot_steps import kind_of, mode_of, next_slot_step
from sfi_agent.engine.requests import DenseStep, FastStep
from sfi_agent.engine.sampling import TokenChooser
from sfi_agent.engine.sequence import SequenceState

__all__ = ["Ahead", "AheadSteps"]

_LEAST_ODDS = 0.9
"""Beginning a step saves the host's share of it, a few hundredths to a tenth; in vain it costs all
of it."""
_MEMORY = 0.95
"""Weight of what was seen before, per step."""


@dataclass(slots=True)
class _Row:
    """One row of a step that was begun.

    Attributes:
        sequence: Whose step it is.
        position: Of the token that it processes.
        token_id: That token, once it is known.
        chooser: Draws what comes after it.
        moves: Of the sequence when it was begun: a history that has moved since did not take along
            what the step wrote behind its end.
    """

    sequence: weakref.ref[SequenceState]
    position: int
    token_id: int
    chooser: TokenChooser
    moves: int

    def fits(self, request: FastStep | DenseStep) -> bool:
        """Whether this is the step that is asked for."""
        sequence = request.sequence
        token = request.token_id if isinstance(request, FastStep) else request.ids[0]
        return (
            sequence is self.sequence()
            and sequence.processed_tokens == self.position
            and sequence.moves.count == self.moves
            and token == self.token_id
            and request.drawing.chooser == self.chooser
            and not request.drawing.with_logits
        )


@dataclass(slots=True)
class Ahead:
    """A step that was begun early.

    Attributes:
        kind: "fast" or "dense".
        rows: By slot.
        program: Runs it.
        pending: Its results; None where it was not begun, only expected.
    """

    kind: str
    rows: dict[int, _Row]
    program: StepProgram
    pending: PendingStep | None

    def fits(self, slots: Sequence[int], requests: Sequence[FastStep | DenseStep]) -> bool:
        """Whether it is what these rows ask for, no more and no less."""
        return (
            sorted(slots) == sorted(self.rows)
            and mode_of(requests) == self.program.mode
            and all(kind_of(request) == self.kind for request in requests)
            and all(self.rows[s].fits(r) for s, r in zip(slots, requests, strict=True))
        )


class AheadSteps:
    """At most one step ahead per cohort."""

    def __init__(self) -> None:
        self._expected: dict[Cohort, Ahead] = {}
        self._odds: dict[Cohort, float] = {}

    def take(
        self, cohort: Cohort, slots: Sequence[int], requests: Sequence[FastStep | DenseStep]
    ) -> Ahead | None:
        """The step that was begun for these rows, if it is the one they ask for."""
        expected = self._expected.pop(cohort, None)
        for request in requests:
            # Stepped here, a sequence makes stale what another cohort has begun for it.
            self.forget(request.sequence)
        if expected is None:
            return None
        fits = expected.fits(slots, requests)
        self._odds[cohort] = _MEMORY * self._odds.get(cohort, 1.0) + (1.0 - _MEMORY) * fits
        return expected if fits and expected.pending is not None else None

    def drop(self, cohort: Cohort) -> None:
        """Another kind of step comes in between."""
        self._expected.pop(cohort, None)

    def clear(self) -> None:
        """Nothing of what was begun counts any more."""
        self._expected.clear()

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is stepped elsewhere."""
        for cohort, ahead in list(self._expected.items()):
            if any(row.sequence() is sequence for row in ahead.rows.values()):
                del self._expected[cohort]

    def begin(
        self,
        program: StepProgram,
        slots: Sequence[int],
        requests: Sequence[FastStep | DenseStep],
        shared: int,
    ) -> Ahead | None:
        """Start the step over the tokens that are being drawn, where it is likely to follow.

        Args:
            program: The one that draws them.
            slots: Of the sequences.
            requests: The steps under way, already noted in the sequences' states.
            shared: Tokens of a prefix that all rows share.

        Returns:
            None where no step is expected. Its tokens are unknown yet (see `know`).
        """
        kinds = {kind_of(request) for request in requests}
        if kinds not in ({"fast"}, {"dense"}):
            return None
        steps = [next_slot_step(request, shared) for request in requests]
        rows: dict[int, _Row] = {}
        for slot, request, step in zip(slots, requests, steps, strict=True):
            if step is None:
                return None
            rows[slot] = _row(request)
        pending = None
        if self._odds.get(program.cohort, 1.0) >= _LEAST_ODDS:
            pending = program.run(
                {s: step for s, step in zip(slots, steps, strict=True) if step is not None}
            )
        return Ahead(kinds.pop(), rows, program, pending)

    def know(self, ahead: Ahead, token_ids: dict[int, int]) -> None:
        """The tokens have arrived, by slot: from now on the step can be asked for."""
        for slot, row in ahead.rows.items():
            row.token_id = token_ids[slot]
        self._expected[ahead.program.cohort] = ahead


def _row(request: FastStep | DenseStep) -> _Row:
    sequence = request.sequence
    return _Row(
        weakref.ref(sequence),
        sequence.processed_tokens,
        CHAINED,
        request.drawing.chooser,
        sequence.moves.count,
    )
