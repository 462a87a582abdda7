"""Executes the requests of decodings with programs, and says which requests it cannot execute."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from sfi_agent.engine.decoding_state import Choice
from sfi_agent.engine.kernels import kernel_problem
from sfi_agent.engine.programs.cohort import Cohort, Geometry, geometry_of, shared_tokens
from sfi_agent.engine.programs.cohort_programs import CohortPrograms, ProgramOptions
from sfi_agent.engine.programs.control import CHAINED, FAST, SLOW, SlotStep
from sfi_agent.engine.programs.program import DrawMode, PendingStep, StepProgram
from sfi_agent.engine.programs.refreshing import RowRefresh, flush_segments, refresh_rows
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    Drawing,
    FastStep,
    RefreshStep,
    StepOutcome,
    StepRequest,
)
from sfi_agent.engine.sampling import OverridingChooser, Sampler, TokenChooser
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.protocols import Ranking, Selection, Selector, declared_ranking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ProgramSteps"]

_BLOCK_STEP = 8
_LARGEST_BLOCK = 128
_MOST_EXTENTS = 8
_LARGEST_BATCH = 64
LEAST_SHARED_TOKENS = 1024
"""Shorter shared prefixes are read row by row: a second launch and a merge cost more."""


@dataclass(slots=True)
class _Ahead:
    """A fast step that was begun before anybody looked at its token."""

    sequence: weakref.ref[SequenceState]
    position: int
    token_id: int
    chooser: TokenChooser
    program: StepProgram
    pending: PendingStep


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
        self._geometries: WeakKeyDictionary[SequenceState, tuple[int, Geometry | None]]
        self._geometries = WeakKeyDictionary()
        self._blocks: WeakKeyDictionary[SequenceState, CohortPrograms] = WeakKeyDictionary()
        self._ahead: dict[int, _Ahead] = {}
        self._problems: dict[Geometry, str | None] = {}
        self.least_capacity_tokens = 0

    @property
    def bytes(self) -> int:
        """Of evidence, ranking keys and kept queries of all cohorts."""
        return sum(programs.bytes for programs in self._cohorts.values())

    def problem(self, request: StepRequest) -> str | None:
        """What keeps a request from programs, in words; None if nothing does."""
        sequence = request.sequence
        if not sequence.processed_tokens:
            return "an empty history"
        if isinstance(request, RefreshStep):
            return None if sequence in self._blocks else "a block that ran eagerly"
        if isinstance(request, DenseStep) and request.interrupted is not None:
            if len(request.ids) > 1 or request.interrupted():
                return "a prefill"
        if isinstance(request, BlockStep) and request.continues:
            return "a block in several parts"
        if isinstance(request, (BlockStep, DenseStep)) and len(request.ids) > _LARGEST_BLOCK:
            return f"a block of more than {_LARGEST_BLOCK} tokens"
        if isinstance(request, FastStep):
            if request.measure_mass:
                return "a detector that needs attention_drift"
            if request.on_fast_attention is not None:
                return "an instrument that watches attention"
        if isinstance(request, DenseStep) and request.evidence_rows > 1:
            return "several evidence queries"
        if _sampler(request.drawing) is None:
            return "a chooser of its own"
        geometry = self._geometry(sequence)
        if geometry is None:
            return "layers of different head sizes"
        if geometry.extents > _MOST_EXTENTS:
            return f"a history of more than {_MOST_EXTENTS // 2} extents"
        return self._kernel_problem(geometry)

    @torch.no_grad()
    def execute(self, requests: Sequence[StepRequest], batch: int) -> list[StepOutcome]:
        """Execute requests that have no problem.

        Args:
            requests: Each of another sequence.
            batch: Sequences that are decoded together.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for index, request in enumerate(requests):
            sequence = request.sequence
            kind = _kind(request)
            ranking = _ranking(request) if kind in ("mixed", "refresh") else None
            merged = "single" if kind in ("fast", "mixed") else kind
            if isinstance(request, RefreshStep):
                key = (merged, id(self._blocks[sequence]), ranking)
            else:
                key = (merged, self._geometry(sequence), None if merged != kind else ranking)
            groups.setdefault(key, []).append(index)
        outcomes: list[StepOutcome] = [StepOutcome()] * len(requests)
        for key, members in groups.items():
            chosen = [requests[index] for index in members]
            for index, outcome in zip(members, self._group(str(key[0]), chosen, batch), strict=True):
                outcomes[index] = outcome
        return outcomes

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is stepped elsewhere: what was begun or kept for it is stale."""
        self._blocks.pop(sequence, None)
        for cohort, ahead in list(self._ahead.items()):
            if ahead.sequence() is sequence:
                del self._ahead[cohort]

    def _group(
        self, kind: str, requests: Sequence[StepRequest], batch: int
    ) -> list[StepOutcome]:
        if kind == "refresh":
            found = [request for request in requests if isinstance(request, RefreshStep)]
            return self._refresh(found)
        if kind == "block":
            blocks = [r for r in requests if isinstance(r, (BlockStep, DenseStep))]
            return self._block(blocks, batch)
        singles = [r for r in requests if isinstance(r, (FastStep, DenseStep))]
        slow = [request for request in singles if isinstance(request, DenseStep)]
        rankings = {_ranking(request) for request in slow if request.refresh is not None}
        if len(rankings) > 1:
            # Evidence is left in one form per step: rows of another kind of selector step apart.
            return [self._single([request], batch)[0] for request in singles]
        return self._single(singles, batch)

    def _single(
        self, requests: Sequence[FastStep | DenseStep], batch: int
    ) -> list[StepOutcome]:
        """One token of each sequence, slow rows and fast rows in one pass."""
        sequences = [request.sequence for request in requests]
        for request in requests:
            _make_room(request)
        programs, slots = self._seat(sequences, batch)
        cohort = programs.cohort
        ahead = self._ahead.pop(id(cohort), None)
        if ahead is not None and _continues(ahead, requests):
            program, pending = ahead.program, ahead.pending
        else:
            flushed = [
                (slot, request.sequence)
                for slot, request in zip(slots, requests, strict=True)
                if isinstance(request, DenseStep) and request.flush_segment
            ]
            flush_segments(cohort, [s for s, _ in flushed], [q for _, q in flushed])
            shared = _shared_end(requests)
            program = self._program(programs, requests, shared > 0)
            steps = {
                slot: _slot_step(request, shared)
                for slot, request in zip(slots, requests, strict=True)
            }
            pending = program.run(steps)
        for request in requests:
            _note_step(request, 1)
        begun = self._begin_next(programs, program, slots, requests)
        selections = self._refreshes(programs, slots, requests)
        outcomes = [
            StepOutcome(
                _choices(pending, program, slot, request.drawing, request.drawing.position, 1), found
            )
            for slot, request, found in zip(slots, requests, selections, strict=True)
        ]
        if begun is not None:
            begun.token_id = outcomes[0].choice.token_id
            self._ahead[id(cohort)] = begun
        return outcomes

    def _begin_next(
        self,
        programs: CohortPrograms,
        program: StepProgram,
        slots: Sequence[int],
        requests: Sequence[FastStep | DenseStep],
    ) -> _Ahead | None:
        """Start the fast step over the token that is being drawn, where one is likely to follow."""
        request = requests[0]
        if programs.cohort.batch > 1 or not isinstance(request, FastStep):
            # In a batch a row that turns slow would step alone while the others are ahead.
            return None
        if not request.may_continue:
            return None
        sampler, layout = _sampler(request.drawing), request.sequence.layout
        assert sampler is not None and layout is not None
        if request.drawing.with_logits or layout.end >= layout.capacity:
            return None
        position, chooser = request.sequence.processed_tokens, request.drawing.chooser
        token = chooser.at(position, CHAINED) if isinstance(chooser, OverridingChooser) else CHAINED
        step = SlotStep(FAST, layout.end, position, (token,), sampler)
        pending = program.run({slots[0]: step})
        return _Ahead(weakref.ref(request.sequence), position, -1, chooser, program, pending)

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
                ranking = _ranking(request)
        if rows:
            store = programs.store(ranking)
            for index, found in zip(
                places, refresh_rows(programs.cohort, store, rows), strict=True
            ):
                shown[index] = found
        return shown

    def _block(
        self, requests: Sequence[BlockStep | DenseStep], batch: int
    ) -> list[StepOutcome]:
        """A few tokens of each sequence; shorter blocks are filled up behind their end."""
        longest = max(len(request.ids) for request in requests)
        queries = -(-longest // _BLOCK_STEP) * _BLOCK_STEP
        for request in requests:
            for layer in request.sequence.layers:
                # What fills up a block is written as well, and never counted.
                layer.history.make_room(queries)
        programs, slots = self._seat([request.sequence for request in requests], batch)
        self._ahead.pop(id(programs.cohort), None)
        shared = _shared_end(requests)
        program = programs.step("block", _mode(requests), queries, shared=shared > 0)
        steps = {
            slot: _slot_step(request, shared)
            for slot, request in zip(slots, requests, strict=True)
        }
        pending = program.run(steps)
        outcomes = []
        for slot, request in zip(slots, requests, strict=True):
            count = len(request.ids)
            _note_step(request, count)
            self._blocks[request.sequence] = programs
            drawing, rows = request.drawing, count if isinstance(request, BlockStep) else 1
            # A block draws behind each of its tokens, also where only the last draw is wanted.
            first = drawing.position if isinstance(request, BlockStep) else drawing.position - count + 1
            choices = _choices(pending, program, slot, drawing, first, count)
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
                    prompt_end=_prompt_end(request.sequence),
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
        geometry = self._geometry(sequences[0])
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
        longest = max(sequence.processed_tokens for sequence in sequences) + _LARGEST_BLOCK
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

    def _keep_queries(
        self, programs: CohortPrograms, sequence: SequenceState, slot: int
    ) -> None:
        """A sequence loses its slot between a block and its refresh: it takes its queries along."""
        if self._blocks.get(sequence) is programs:
            for index, layer in enumerate(sequence.layers):
                if layer.memory is not None:
                    layer.captured_query = programs.kept_query(index, slot)
            del self._blocks[sequence]

    def _program(
        self, programs: CohortPrograms, requests: Sequence[FastStep | DenseStep], shared: bool
    ) -> StepProgram:
        mode = _mode(requests)
        if all(isinstance(request, FastStep) for request in requests):
            return programs.step("fast", mode)
        refreshing = [
            request
            for request in requests
            if isinstance(request, DenseStep) and request.refresh is not None
        ]
        if not refreshing:
            return programs.step("dense", mode, shared=shared)
        return programs.step("mixed", mode, ranking=_ranking(refreshing[0]))

    def _kernel_problem(self, geometry: Geometry) -> str | None:
        if geometry not in self._problems:
            self._problems[geometry] = (
                kernel_problem(self._device, geometry.dtype, geometry.key_dim, geometry.value_dim)
                if self._options.capture
                else None
            )
        return self._problems[geometry]

    def _geometry(self, sequence: SequenceState) -> Geometry | None:
        known = self._geometries.get(sequence)
        if known is None or known[0] != sequence.moves.count:
            known = (sequence.moves.count, geometry_of(sequence))
            self._geometries[sequence] = known
        return known[1]


def _kind(request: StepRequest) -> str:
    if isinstance(request, RefreshStep):
        return "refresh"
    if isinstance(request, FastStep):
        return "fast"
    if isinstance(request, BlockStep) or len(request.ids) > 1:
        return "block"
    return "mixed" if request.refresh is not None else "dense"


def _selector(request: StepRequest) -> Selector | None:
    if isinstance(request, RefreshStep):
        return request.order.selector
    if isinstance(request, DenseStep) and request.refresh is not None:
        return request.refresh.selector
    return None


def _ranking(request: StepRequest) -> Ranking | None:
    selector = _selector(request)
    return declared_ranking(selector) if selector is not None else None


def _sampler(drawing: Drawing) -> Sampler | None:
    chooser = drawing.chooser
    inner = chooser.sampler if isinstance(chooser, OverridingChooser) else chooser
    return inner if isinstance(inner, Sampler) else None


def _mode(requests: Sequence[FastStep | DenseStep | BlockStep]) -> DrawMode:
    samplers = [sampler for r in requests if (sampler := _sampler(r.drawing)) is not None]
    return DrawMode(
        greedy=all(sampler.temperature == 0.0 for sampler in samplers),
        filtered=any(
            sampler.temperature > 0.0 and (sampler.top_k > 0 or sampler.top_p < 1.0)
            for sampler in samplers
        ),
        with_entropy=any(request.drawing.with_entropy for request in requests),
    )


def _make_room(request: FastStep | DenseStep) -> None:
    """Room in every history that the step, and one begun ahead of it, may write to."""
    sequence = request.sequence
    if isinstance(request, FastStep):
        for layer in sequence.layers:
            if layer.memory is None:
                layer.history.make_room(2)
        return
    new = 1 + (sequence.segment_tokens if request.flush_segment else 0)
    for layer in sequence.layers:
        layer.history.make_room(new)


def _shared_end(requests: Sequence[FastStep | DenseStep | BlockStep]) -> int:
    """How long a prefix the rows of a step share, where reading it once is worth a launch.

    Slow steps that leave evidence do so row by row: they are staggered, so that no two of them
    meet often.
    """
    if len(requests) < 2:
        return 0
    for request in requests:
        single = isinstance(request, DenseStep) and len(request.ids) == 1
        if isinstance(request, FastStep) or (single and request.refresh is not None):
            return 0
    shared = shared_tokens([request.sequence for request in requests])
    return shared if shared >= LEAST_SHARED_TOKENS else 0


def _slot_step(request: FastStep | DenseStep | BlockStep, shared_end: int) -> SlotStep:
    sequence, sampler = request.sequence, _sampler(request.drawing)
    assert sampler is not None
    processed = sequence.processed_tokens
    if isinstance(request, FastStep):
        assert sequence.layout is not None and sequence.layout.ready
        return SlotStep(FAST, sequence.layout.end, processed, (request.token_id,), sampler)
    return SlotStep(
        SLOW,
        0,
        processed,
        tuple(request.ids),
        sampler,
        prompt_end=_prompt_end(sequence),
        shared_end=shared_end,
    )


def _prompt_end(sequence: SequenceState) -> int:
    return (sequence.layout.prompt_end or 0) if sequence.layout is not None else 0


def _note_step(request: FastStep | DenseStep | BlockStep, tokens: int) -> None:
    """The step's tokens are where the state says they are."""
    sequence = request.sequence
    fast = isinstance(request, FastStep)
    for layer in sequence.layers:
        if not fast or layer.memory is None:
            layer.history.note_written(tokens)
    sequence.processed_tokens += tokens
    if sequence.layout is not None:
        if fast:
            sequence.layout.advance(tokens)
        else:
            sequence.layout.ready = False


def _continues(ahead: _Ahead, requests: Sequence[FastStep | DenseStep]) -> bool:
    """Whether the step that was begun is the one that is asked for."""
    request = requests[0]
    return (
        len(requests) == 1
        and isinstance(request, FastStep)
        and request.sequence is ahead.sequence()
        and request.sequence.processed_tokens == ahead.position
        and request.token_id == ahead.token_id
        and request.drawing.chooser == ahead.chooser
        and not request.drawing.with_logits
        and _mode(requests) == ahead.program.mode
    )


def _choices(
    pending: PendingStep,
    program: StepProgram,
    slot: int,
    drawing: Drawing,
    first_position: int,
    count: int,
) -> tuple[Choice, ...]:
    """What was drawn behind the first `count` tokens of a slot, for positions from the first on."""
    found = []
    chooser = drawing.chooser
    given = chooser if isinstance(chooser, OverridingChooser) else None
    for row, (token, entropy) in enumerate(pending.read(slot)[:count]):
        if given is not None:
            token = given.at(first_position + row, token)
        logits = program.logits[slot, row].clone() if drawing.with_logits else None
        found.append(Choice(token, entropy if drawing.with_entropy else None, None, logits))
    return tuple(found)

