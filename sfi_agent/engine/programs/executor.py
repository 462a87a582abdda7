"""Executes the requests of decodings with programs, and says which requests it cannot execute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from sfi_agent.engine.programs.ahead import Ahead, begin_next, continues
from sfi_agent.engine.programs.cohort import Cohort, Geometry
from sfi_agent.engine.programs.cohort_programs import CohortPrograms, ProgramOptions
from sfi_agent.engine.programs.control import SLOW, SlotStep
from sfi_agent.engine.programs.program import StepProgram
from sfi_agent.engine.programs.refreshing import RowRefresh, flush_segments, refresh_rows
from sfi_agent.engine.programs.slot_steps import (
    choices_of,
    kind_of,
    make_room,
    mode_of,
    note_step,
    prompt_end,
    ranking_of,
    shared_end,
    slot_step,
)
from sfi_agent.engine.programs.support import LARGEST_BLOCK, Support
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    FastStep,
    RefreshStep,
    StepOutcome,
    StepRequest,
)
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.protocols import Ranking, Selection, declared_ranking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ProgramSteps"]

_BLOCK_STEP = 8
_LARGEST_BATCH = 64


class ProgramSteps:
    """See the module text.

    Args:
        model: Its attention is switched to ours.
        query_heads: Query heads of a layer.
        device: Where everything lives.
        options: How programs are made.

    Attributes:
        least_capacity_tokens: Histories that programs are made for at least, so that they need not
            be made anew as a history grows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        query_heads: int,
        device: torch.device,
        options: ProgramOptions,
    ) -> None:
        self._model = model
        self._query_heads = query_heads
        self._device = device
        self._options = options
        self._cohorts: dict[tuple[Geometry, int], CohortPrograms] = {}
        self._support = Support(device, kernels=options.capture)
        self._blocks: WeakKeyDictionary[SequenceState, CohortPrograms] = WeakKeyDictionary()
        self._ahead: dict[int, Ahead] = {}
        self.least_capacity_tokens = 0

    @property
    def bytes(self) -> int:
        """Of evidence, ranking keys and kept queries of all cohorts."""
        return sum(programs.bytes for programs in self._cohorts.values())

    def problem(self, request: StepRequest) -> str | None:
        """What keeps a request from programs, in words; None if nothing does."""
        if isinstance(request, RefreshStep):
            return None if request.sequence in self._blocks else "a block that ran eagerly"
        return self._support.problem(request)

    @torch.no_grad()
    def execute(self, requests: Sequence[StepRequest], batch: int) -> list[StepOutcome]:
        """Execute requests that have no problem.

        Args:
            requests: Each of another sequence.
            batch: Sequences that are decoded together.
        """
        groups: dict[tuple[str, object], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._group_of(request), []).append(index)
        outcomes: list[StepOutcome] = [StepOutcome()] * len(requests)
        for (kind, _), members in groups.items():
            done = self._group(kind, [requests[index] for index in members], batch)
            for index, outcome in zip(members, done, strict=True):
                outcomes[index] = outcome
        return outcomes

    def _group_of(self, request: StepRequest) -> tuple[str, object]:
        """Requests of one group can be executed in one step."""
        if isinstance(request, RefreshStep):
            return "refresh", self._blocks[request.sequence]
        kind = kind_of(request)
        # Slow rows and fast rows share a step.
        kind = "single" if kind in ("fast", "mixed") else kind
        return kind, self._support.geometry(request.sequence)

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is stepped elsewhere: what was begun or kept for it is stale."""
        self._blocks.pop(sequence, None)
        for cohort, ahead in list(self._ahead.items()):
            if ahead.sequence() is sequence:
                del self._ahead[cohort]

    def _group(self, kind: str, requests: Sequence[StepRequest], batch: int) -> list[StepOutcome]:
        if kind == "refresh":
            found = [request for request in requests if isinstance(request, RefreshStep)]
            return self._refresh(found)
        if kind == "block":
            blocks = [r for r in requests if isinstance(r, (BlockStep, DenseStep))]
            return self._block(blocks, batch)
        singles = [r for r in requests if isinstance(r, (FastStep, DenseStep))]
        slow = [request for request in singles if isinstance(request, DenseStep)]
        rankings = {ranking_of(request) for request in slow if request.refresh is not None}
        if len(rankings) > 1:
            # Evidence is left in one form per step: rows of another kind of selector step apart.
            return [self._single([request], batch)[0] for request in singles]
        return self._single(singles, batch)

    def _single(self, requests: Sequence[FastStep | DenseStep], batch: int) -> list[StepOutcome]:
        """One token of each sequence, slow rows and fast rows in one pass."""
        sequences = [request.sequence for request in requests]
        for request in requests:
            make_room(request)
        programs, slots = self._seat(sequences, batch)
        cohort = programs.cohort
        ahead = self._ahead.pop(id(cohort), None)
        if ahead is not None and continues(ahead, requests):
            program, pending = ahead.program, ahead.pending
        else:
            flushed = [
                (slot, request.sequence)
                for slot, request in zip(slots, requests, strict=True)
                if isinstance(request, DenseStep) and request.flush_segment
            ]
            flush_segments(cohort, [s for s, _ in flushed], [q for _, q in flushed])
            shared = shared_end(requests)
            program = self._program(programs, requests, shared > 0)
            steps = {
                slot: slot_step(request, shared)
                for slot, request in zip(slots, requests, strict=True)
            }
            pending = program.run(steps)
        for request in requests:
            note_step(request, 1)
        begun = begin_next(program, slots[0], requests[0])
        selections = self._refreshes(programs, slots, requests)
        outcomes = [
            StepOutcome(
                choices_of(pending, program, slot, request.drawing, request.drawing.position, 1),
                found,
            )
            for slot, request, found in zip(slots, requests, selections, strict=True)
        ]
        if begun is not None:
            begun.token_id = outcomes[0].choice.token_id
            self._ahead[id(cohort)] = begun
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

    def _block(self, requests: Sequence[BlockStep | DenseStep], batch: int) -> list[StepOutcome]:
        """A few tokens of each sequence; shorter blocks are filled up behind their end."""
        longest = max(len(request.ids) for request in requests)
        queries = -(-longest // _BLOCK_STEP) * _BLOCK_STEP
        for request in requests:
            for layer in request.sequence.layers:
                # What fills up a block is written as well, and never counted.
                layer.history.make_room(queries)
        programs, slots = self._seat([request.sequence for request in requests], batch)
        self._ahead.pop(id(programs.cohort), None)
        shared = shared_end(requests)
        program = programs.step("block", mode_of(requests), queries, shared=shared > 0)
        steps = {
            slot: slot_step(request, shared) for slot, request in zip(slots, requests, strict=True)
        }
        pending = program.run(steps)
        outcomes = []
        for slot, request in zip(slots, requests, strict=True):
            count = len(request.ids)
            note_step(request, count)
            self._blocks[request.sequence] = programs
            drawing, rows = request.drawing, count if isinstance(request, BlockStep) else 1
            # A block draws behind each of its tokens, also where only the last draw is wanted.
            first = (
                drawing.position if isinstance(request, BlockStep) else drawing.position - count + 1
            )
            choices = choices_of(pending, program, slot, drawing, first, count)
            outcomes.append(StepOutcome(choices[-rows:]))
        refreshing = [
            RefreshStep(request.sequence, len(request.ids) - 1, len(request.ids), request.refresh)
            for request in requests
            if isinstance(request, DenseStep) and request.refresh is not None
        ]
        if refreshing:
            shown = iter(self._refresh(refreshing))
            outcomes = [
                StepOutcome(outcome.choices, next(shown).selections)
                if isinstance(request, DenseStep) and request.refresh is not None
                else outcome
                for outcome, request in zip(outcomes, requests, strict=True)
            ]
        return outcomes

    def _refresh(self, requests: Sequence[RefreshStep]) -> list[StepOutcome]:
        """Refresh from rows that a block has kept."""
        by_ranking: dict[Ranking | None, list[int]] = {}
        for index, request in enumerate(requests):
            by_ranking.setdefault(declared_ranking(request.order.selector), []).append(index)
        outcomes = [StepOutcome()] * len(requests)
        for ranking, members in by_ranking.items():
            chosen = [requests[index] for index in members]
            programs = self._blocks[chosen[0].sequence]
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
        return outcomes

    def _seat(
        self, sequences: Sequence[SequenceState], batch: int
    ) -> tuple[CohortPrograms, list[int]]:
        """The cohort of these sequences, and their slots in it, with tables up to date."""
        geometry = self._support.geometry(sequences[0])
        assert geometry is not None
        size = max(batch, len(sequences))
        size = min(1 << (size - 1).bit_length(), max(_LARGEST_BATCH, len(sequences)))
        key = (geometry, size)
        programs = self._cohorts.get(key)
        if programs is None:
            cohort = Cohort(geometry, size, self._device)
            programs = CohortPrograms(self._model, cohort, self._query_heads, self._options)
            cohort.on_evict = partial(self._keep_queries, programs)
            self._cohorts[key] = programs
        longest = max(sequence.processed_tokens for sequence in sequences) + LARGEST_BLOCK
        before = programs.capacity
        programs.make_room(max(longest, self.least_capacity_tokens))
        if programs.capacity != before:
            self._ahead.pop(id(programs.cohort), None)
        ahead = self._ahead.get(id(programs.cohort))
        if ahead is not None and ahead.sequence() not in sequences:
            del self._ahead[id(programs.cohort)]
        slots = programs.cohort.take_slots(sequences)
        programs.cohort.place(slots, sequences)
        return programs, slots

    def _keep_queries(self, programs: CohortPrograms, sequence: SequenceState, slot: int) -> None:
        """A sequence loses its slot between a block and its refresh: it takes its queries along."""
        if self._blocks.get(sequence) is programs:
            for index, layer in enumerate(sequence.layers):
                if layer.memory is not None:
                    layer.captured_query = programs.kept_query(index, slot)
            del self._blocks[sequence]

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
        return programs.step("mixed", mode, ranking=ranking_of(refreshing[0]))
