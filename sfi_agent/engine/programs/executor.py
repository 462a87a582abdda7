"""Executes the requests of decodings with programs, and says which requests it cannot execute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch

from sfi_agent.engine.programs.ahead import AheadSteps
from sfi_agent.engine.programs.cohort import Cohort, Geometry
from sfi_agent.engine.programs.cohort_programs import (
    CohortPrograms,
    ProgramNotMade,
    ProgramOptions,
)
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


class _KeptBlock(NamedTuple):
    """Whose captured queries hold the last block of a sequence, and how many tokens it had."""

    programs: CohortPrograms
    tokens: int


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
        self._blocks: WeakKeyDictionary[SequenceState, _KeptBlock] = WeakKeyDictionary()
        self._ahead = AheadSteps()
        self._others = False
        self.least_capacity_tokens = 0

    @property
    def bytes(self) -> int:
        """Of evidence, ranking keys and kept queries of all cohorts."""
        return sum(programs.bytes for programs in self._cohorts.values())

    def problem(self, request: StepRequest) -> str | None:
        """What keeps a request from programs, in words; None if nothing does."""
        if isinstance(request, RefreshStep):
            if request.sequence not in self._blocks:
                return "a block that ran eagerly"
            several = request.stop_row - request.first_row > 1
            return "several evidence queries" if several else None
        return self._support.problem(request)

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
            return self._blocks[request.sequence].programs
        return self._support.geometry(request.sequence)

    def forget_all(self) -> None:
        """As `forget`, for every sequence."""
        self._ahead.clear()
        for sequence in list(self._blocks):
            self.forget(sequence)

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is stepped elsewhere: what was begun for it is stale, and the queries of
        its block go along."""
        block = self._blocks.get(sequence)
        if block is not None:
            slot = block.programs.cohort.take_slots([sequence])[0]
            self._keep_queries(block.programs, sequence, slot)
        self._ahead.forget(sequence)

    def _group(self, kind: str, requests: Sequence[StepRequest], batch: int) -> list[StepOutcome]:
        if kind == "refresh":
            found = [request for request in requests if isinstance(request, RefreshStep)]
            return self._refresh(found)
        if kind == "block":
            blocks = [r for r in requests if isinstance(r, (BlockStep, DenseStep))]
            return self._block(blocks, batch)
        return self._single([r for r in requests if isinstance(r, (FastStep, DenseStep))], batch)

    def _single(self, requests: Sequence[FastStep | DenseStep], batch: int) -> list[StepOutcome]:
        """One token of each sequence, slow rows and fast rows in one pass."""
        sequences = [request.sequence for request in requests]
        for request in requests:
            make_room(request)
        programs, slots = self._seat(sequences, batch)
        cohort = programs.cohort
        ahead, shared = self._ahead.take(cohort, slots, requests), shared_end(requests)
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
            begun = self._ahead.begin(program, slots, requests, shared)
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
            self._ahead.know(begun, drawn)
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
        self._ahead.drop(programs.cohort)
        for request in requests:
            self._ahead.forget(request.sequence)
        shared = shared_end(requests)
        program = programs.step("block", mode_of(requests), queries, shared=shared > 0)
        for ranking in {ranking_of(r) for r in requests if isinstance(r, DenseStep)}:
            # Made before anything is stepped, in case that it cannot be made.
            programs.evidence(ranking)
        steps = {
            slot: slot_step(request, shared) for slot, request in zip(slots, requests, strict=True)
        }
        pending = program.run(steps)
        outcomes = []
        for slot, request in zip(slots, requests, strict=True):
            count = len(request.ids)
            note_step(request, count)
            self._blocks[request.sequence] = _KeptBlock(programs, count)
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
            programs = self._blocks[chosen[0].sequence].programs
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
                self._blocks.pop(requests[index].sequence, None)
        return outcomes

    def _seat(
        self, sequences: Sequence[SequenceState], batch: int
    ) -> tuple[CohortPrograms, list[int]]:
        """The cohort of these sequences, and their slots in it, with tables up to date."""
        geometry = self._support.geometry(sequences[0])
        assert geometry is not None
        size = max(batch, len(sequences))
        size = 1 << (size - 1).bit_length()
        key = (geometry, size)
        programs = self._cohorts.get(key)
        if programs is None:
            cohort = Cohort(geometry, size, self._device)
            programs = CohortPrograms(self._model, cohort, self._query_heads, self._options)
            cohort.on_evict = partial(self._keep_queries, programs)
            self._cohorts[key] = programs
        longest = max(sequence.processed_tokens for sequence in sequences) + LARGEST_BLOCK
        before = programs.capacity
        programs.make_room(max(longest, self.least_capacity_tokens + LARGEST_BLOCK))
        if programs.capacity != before:
            self._ahead.drop(programs.cohort)
        slots = programs.cohort.take_slots(sequences)
        programs.cohort.place(slots, sequences)
        return programs, slots

    def _keep_queries(self, programs: CohortPrograms, sequence: SequenceState, slot: int) -> None:
        """A sequence loses its slot between a block and its refresh: it takes its queries along."""
        block = self._blocks.get(sequence)
        if block is not None and block.programs is programs:
            for index, layer in enumerate(sequence.layers):
                if layer.memory is not None:
                    layer.captured_query = programs.kept_query(index, slot)[:, : block.tokens]
                    # A fork may not have had an eager step yet, which would have noted it.
                    layer.scale = programs.scales[index]
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
