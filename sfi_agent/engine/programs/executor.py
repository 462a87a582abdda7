"""Executes the requests of decodings with programs, and says which requests it cannot execute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sfi_agent.engine.programs.block_steps import BlockSteps
from sfi_agent.engine.programs.cohort_programs import (
    CohortPrograms,
    ProgramNotMade,
    ProgramOptions,
)
from sfi_agent.engine.programs.program import StepProgram
from sfi_agent.engine.programs.refreshing import RowRefresh, flush_segments, refresh_rows
from sfi_agent.engine.programs.seats import Seats
from sfi_agent.engine.programs.slot_steps import (
    choices_of,
    kind_of,
    make_room,
    mode_of,
    note_step,
    ranking_of,
    shared_end,
    slot_step,
)
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    FastStep,
    RefreshStep,
    StepOutcome,
    StepRequest,
)
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.protocols import Ranking, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ProgramSteps"]


class ProgramSteps:
    """See the module text.

    Args:
        model: Its attention is switched to ours.
        query_heads: Query heads of a layer.
        device: Where everything lives.
        options: How programs are made.

    Attributes:
        seats: Where sequences sit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        query_heads: int,
        device: torch.device,
        options: ProgramOptions,
    ) -> None:
        self.seats = Seats(model, query_heads, device, options)
        self._blocks = BlockSteps(self.seats)
        self._others = False

    def problem(self, request: StepRequest) -> str | None:
        """What keeps a request from programs, in words; None if nothing does."""
        if isinstance(request, RefreshStep):
            if self._blocks.programs_of(request.sequence) is None:
                return "a block that ran eagerly"
            several = request.stop_row - request.first_row > 1
            return "several evidence queries" if several else None
        return self.seats.support.problem(request)

    @torch.no_grad()
    def execute(
        self, requests: Sequence[StepRequest], batch: int, waiting: int = 0
    ) -> list[StepOutcome]:
        """Execute requests that have no problem.

        Args:
            requests: Each of another sequence.
            batch: Sequences that are decoded together.
            waiting: How many of them wait for a later step.

        Raises:
            ProgramNotMade: Some were not stepped at all, the others whole (see its `outcomes`).
        """
        outcomes: list[StepOutcome | None] = [None] * len(requests)
        groups = self._groups(requests)
        self._others = waiting > 0 or len(groups) > 1
        for kind, members in groups:
            try:
                done = self._group(kind, [requests[index] for index in members], batch)
            except ProgramNotMade as error:
                error.outcomes = outcomes
                raise
            for index, outcome in zip(members, done, strict=True):
                outcomes[index] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def _groups(self, requests: Sequence[StepRequest]) -> list[tuple[str, list[int]]]:
        """Requests that one step executes: its kind and their indices.

        Slow rows and fast rows share a step, but evidence is left in one form per step: rows of
        another kind of selector step apart.
        """
        groups: dict[tuple[str, object, Ranking | None], list[int]] = {}
        for index, request in enumerate(requests):
            kind, place = kind_of(request), self._place(request)
            ranking = ranking_of(request) if kind in ("mixed", "refresh") else None
            groups.setdefault((kind, place, ranking), []).append(index)
        for kind, place, ranking in list(groups):
            if kind == "mixed":
                groups[kind, place, ranking] += groups.pop(("fast", place, None), [])
        return [(kind, members) for (kind, _, _), members in groups.items()]

    def _place(self, request: StepRequest) -> object:
        """Equal for requests that can be executed by the same programs."""
        if isinstance(request, RefreshStep):
            return self._blocks.programs_of(request.sequence)
        return self.seats.support.geometry(request.sequence)

    def forget_all(self) -> None:
        """As `forget`, for every sequence."""
        self.seats.ahead.clear()
        self._blocks.forget_all()

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is stepped elsewhere: what was begun for it is stale, and the queries of
        its block go along."""
        self._blocks.forget(sequence)
        self.seats.ahead.forget(sequence)

    def _group(self, kind: str, requests: Sequence[StepRequest], batch: int) -> list[StepOutcome]:
        if kind == "refresh":
            found = [request for request in requests if isinstance(request, RefreshStep)]
            return self._blocks.refresh(found)
        if kind == "block":
            blocks = [r for r in requests if isinstance(r, (BlockStep, DenseStep))]
            return self._blocks.run(blocks, batch)
        return self._single([r for r in requests if isinstance(r, (FastStep, DenseStep))], batch)

    def _single(self, requests: Sequence[FastStep | DenseStep], batch: int) -> list[StepOutcome]:
        """One token of each sequence, slow rows and fast rows in one pass."""
        sequences = [request.sequence for request in requests]
        for request in requests:
            make_room(request)
        programs, slots = self.seats.take(sequences, batch)
        cohort = programs.cohort
        ahead, shared = self.seats.ahead.take(cohort, slots, requests), shared_end(requests)
        if ahead is not None and ahead.pending is not None:
            program, pending = ahead.program, ahead.pending
        else:
            flushed = [
                (slot, request.sequence)
                for slot, request in zip(slots, requests, strict=True)
                if isinstance(request, DenseStep) and request.flush_segment
            ]
            flush_segments(cohort, [s for s, _ in flushed], [q for _, q in flushed])
            program = self._program(programs, requests, shared > 0)
            steps = {
                slot: slot_step(request, shared)
                for slot, request in zip(slots, requests, strict=True)
            }
            pending = program.run(steps)
        for request in requests:
            note_step(request, 1)
        begun = None
        if not self._others:
            # Where rows wait, the next step has other rows.
            begun = self.seats.ahead.begin(program, slots, requests, shared)
        selections = self._refreshes(programs, slots, requests)
        outcomes = [
            StepOutcome(
                choices_of(pending, program, slot, request.drawing, request.drawing.position, 1),
                found,
            )
            for slot, request, found in zip(slots, requests, selections, strict=True)
        ]
        if begun is not None:
            drawn = {
                slot: outcome.choice.token_id for slot, outcome in zip(slots, outcomes, strict=True)
            }
            self.seats.ahead.know(begun, drawn)
        return outcomes

    def _refreshes(
        self,
        programs: CohortPrograms,
        slots: Sequence[int],
        requests: Sequence[FastStep | DenseStep],
    ) -> list[list[Selection | None] | None]:
        shown: list[list[Selection | None] | None] = [None] * len(requests)
        rows, places = [], []
        ranking: Ranking | None = None
        for index, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            if isinstance(request, DenseStep) and request.refresh is not None:
                rows.append(RowRefresh(slot, request.sequence, request.refresh))
                places.append(index)
                ranking = ranking_of(request)
        if rows:
            store = programs.store(ranking)
            for index, found in zip(
                places, refresh_rows(programs.cohort, store, rows), strict=True
            ):
                shown[index] = found
        return shown

    def _program(
        self, programs: CohortPrograms, requests: Sequence[FastStep | DenseStep], shared: bool
    ) -> StepProgram:
        mode = mode_of(requests)
        if all(isinstance(request, FastStep) for request in requests):
            return programs.step("fast", mode)
        refreshing = [
            request
            for request in requests
            if isinstance(request, DenseStep) and request.refresh is not None
        ]
        if not refreshing:
            return programs.step("dense", mode, shared=shared)
        # As when all rows of a batch begin; later they are staggered.
        many = 2 * len(refreshing) > programs.cohort.batch > 1
        return programs.step("slow" if many else "mixed", mode, ranking=ranking_of(refreshing[0]))
