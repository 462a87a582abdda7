"""Blocks of rectify and verify, and the refreshes from the queries that they leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sfi_agent.engine.programs.cohort_programs import CohortPrograms
from sfi_agent.engine.programs.control import SLOW, SlotStep
from sfi_agent.engine.programs.program import PendingStep, StepProgram
from sfi_agent.engine.programs.refreshing import RowRefresh, refresh_rows
from sfi_agent.engine.programs.seats import Seats
from sfi_agent.engine.programs.slot_steps import (
    choices_of,
    mode_of,
    note_step,
    prompt_end,
    ranking_of,
    shared_end,
    slot_step,
)
from sfi_agent.engine.requests import BlockStep, DenseStep, RefreshStep, StepOutcome
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.protocols import Ranking, declared_ranking

__all__ = ["BlockSteps"]

_BLOCK_STEP = 8
"""Blocks are filled up to multiples of this, so that few programs serve all lengths."""


class _KeptBlock(NamedTuple):
    """Whose captured queries hold the last block of a sequence, and how many tokens it had."""

    programs: CohortPrograms
    tokens: int


class BlockSteps:
    """See the module text.

    Args:
        seats: Where sequences sit.
    """

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._kept: WeakKeyDictionary[SequenceState, _KeptBlock] = WeakKeyDictionary()
        seats.on_evict = self._take_along

    def programs_of(self, sequence: SequenceState) -> CohortPrograms | None:
        """Whose captured queries hold the last block of a sequence, if any do."""
        kept = self._kept.get(sequence)
        return kept.programs if kept is not None else None

    def forget_all(self) -> None:
        """As `forget`, for every sequence."""
        for sequence in list(self._kept):
            self.forget(sequence)

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is stepped elsewhere; the queries of its block go along."""
        programs = self.programs_of(sequence)
        if programs is not None:
            self._take_along(programs, sequence, programs.cohort.take_slots([sequence])[0])

    def run(self, requests: Sequence[BlockStep | DenseStep], batch: int) -> list[StepOutcome]:
        """A few tokens of each sequence; shorter blocks are filled up behind their end."""
        longest = max(len(request.ids) for request in requests)
        queries = -(-longest // _BLOCK_STEP) * _BLOCK_STEP
        for request in requests:
            for layer in request.sequence.layers:
                # What fills up a block is written as well, and never counted.
                layer.history.make_room(queries)
        programs, slots = self._seats.take([request.sequence for request in requests], batch)
        self._seats.ahead.drop(programs.cohort)
        for request in requests:
            self._seats.ahead.forget(request.sequence)
        shared = shared_end(requests)
        program = programs.step("block", mode_of(requests), queries, shared=shared > 0)
        for ranking in {ranking_of(r) for r in requests if isinstance(r, DenseStep)}:
            # Made before anything is stepped, in case that it cannot be made.
            programs.evidence(ranking)
        steps = {
            slot: slot_step(request, shared) for slot, request in zip(slots, requests, strict=True)
        }
        pending = program.run(steps)
        outcomes = [
            self._noted(programs, pending, program, slot, request)
            for slot, request in zip(slots, requests, strict=True)
        ]
        refreshing = [
            RefreshStep(request.sequence, len(request.ids) - 1, len(request.ids), request.refresh)
            for request in requests
            if isinstance(request, DenseStep) and request.refresh is not None
        ]
        if refreshing:
            shown = iter(self.refresh(refreshing))
            outcomes = [
                StepOutcome(outcome.choices, next(shown).selections)
                if isinstance(request, DenseStep) and request.refresh is not None
                else outcome
                for outcome, request in zip(outcomes, requests, strict=True)
            ]
        return outcomes

    def _noted(
        self,
        programs: CohortPrograms,
        pending: PendingStep,
        program: StepProgram,
        slot: int,
        request: BlockStep | DenseStep,
    ) -> StepOutcome:
        """Note the block in the sequence's state; what was drawn behind its tokens."""
        drawing, count = request.drawing, len(request.ids)
        note_step(request, count)
        self._kept[request.sequence] = _KeptBlock(programs, count)
        if isinstance(request, BlockStep):
            choices = choices_of(pending, program, slot, drawing, drawing.position, count)
            return StepOutcome(choices)
        # A block draws behind each of its tokens, also where only the last draw is wanted.
        first = drawing.position - count + 1
        return StepOutcome(choices_of(pending, program, slot, drawing, first, count)[-1:])

    def refresh(self, requests: Sequence[RefreshStep]) -> list[StepOutcome]:
        """Refresh from rows that a block has kept."""
        by_ranking: dict[Ranking | None, list[int]] = {}
        for index, request in enumerate(requests):
            by_ranking.setdefault(declared_ranking(request.order.selector), []).append(index)
        outcomes = [StepOutcome()] * len(requests)
        for ranking, members in by_ranking.items():
            chosen = [requests[index] for index in members]
            programs = self._kept[chosen[0].sequence].programs
            slots = programs.cohort.take_slots([request.sequence for request in chosen])
            programs.cohort.place(slots, [request.sequence for request in chosen])
            steps = {
                slot: SlotStep(
                    SLOW,
                    0,
                    request.sequence.processed_tokens,
                    (request.stop_row - 1,),
                    prompt_end=prompt_end(request.sequence),
                )
                for slot, request in zip(slots, chosen, strict=True)
            }
            programs.evidence(ranking).start(steps)
            rows = [
                RowRefresh(slot, request.sequence, request.order)
                for slot, request in zip(slots, chosen, strict=True)
            ]
            found = refresh_rows(programs.cohort, programs.store(ranking), rows)
            for index, selections in zip(members, found, strict=True):
                outcomes[index] = StepOutcome(selections=selections)
                self._kept.pop(requests[index].sequence, None)
        return outcomes

    def _take_along(self, programs: CohortPrograms, sequence: SequenceState, slot: int) -> None:
        """A sequence loses its slot between a block and its refresh: it takes its queries along."""
        block = self._kept.get(sequence)
        if block is not None and block.programs is programs:
            for index, layer in enumerate(sequence.layers):
                if layer.memory is not None:
                    layer.captured_query = programs.kept_query(index, slot)[:, : block.tokens]
                    # A fork may not have had an eager step yet, which would have noted it.
                    layer.rule = programs.rules[index]
            del self._kept[sequence]
