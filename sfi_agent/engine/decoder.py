"""The decoding state machine: prefill, then slow and fast steps until a stop.

    dense prefill of everything unprocessed, refresh
      -> choose a token -> detectors see it -> kind of the next step
           slow: flush the segment, dense step, refresh
           fast: step over the memory -> detectors see the step
                   "now": discard it, run the same token densely, refresh (a retry)

Every decoding starts with a dense prefill of at least the pending token, so no selection outlives
a turn. Ids and keys stay consistent when a step raises or the caller stops listening.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.runner import Runner, StepOutput
from sfi_agent.engine.sampling import Sampler, entropy_nats
from sfi_agent.engine.schedule import SegmentSchedule
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.observe.trace import StepRecord
from sfi_agent.protocols import Selection, Selector, StepEvent

__all__ = ["DecodeLimits", "Decoder", "DecodingState", "RefreshObserver"]

StepKind = Literal["fast", "slow", "retry"]
RefreshObserver = Callable[[int, list[Selection | None]], None]
"""Called after a refresh with the history length and the selection per layer."""


@dataclass(slots=True)
class DecodingState:
    """A sequence as the decoder leaves it: ids, keys and values.

    Attributes:
        ids: Every token of the sequence, raw. The last one may be unprocessed (pending).
        sequence: Keys and values of the processed ones.
    """

    ids: list[int]
    sequence: SequenceState

    @property
    def unprocessed(self) -> list[int]:
        return self.ids[self.sequence.processed_tokens :]


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """When a decoding ends.

    Attributes:
        max_new_tokens: At most so many tokens are chosen, at least 1.
        stop_ids: Choosing one of these ends the decoding; it is the last token returned.
        cancelled: Asked between steps; true ends the decoding.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    cancelled: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True, slots=True)
class Choice:
    """A token drawn from a step's logits, and what was read from the device with it."""

    token_id: int
    entropy_nats: float | None
    selected_mass: float | None


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What the decoder takes from a configuration.

    Attributes:
        sparse: False in mode dense, where every step is a dense one.
        minimum_segment_tokens: See `SegmentSchedule`.
        maximum_segment_tokens: See `SegmentSchedule`.
        evidence_queries: Query rows a slow step hands to the selector.
        prefill_evidence_queries: Query rows a prefill hands to the selector.
    """

    sparse: bool
    minimum_segment_tokens: int
    maximum_segment_tokens: int
    evidence_queries: int
    prefill_evidence_queries: int


class Decoder:
    """Decodes one sequence under one policy.

    Args:
        runner: Executes the steps.
        sampler: Chooses tokens.
        selector: Fills the memory; unused in mode dense.
        monitor: The boundary detectors; unused in mode dense.
        settings: See `StepSettings`.
        on_refresh: Told about every refresh, for reports; None costs nothing.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        selector: Selector,
        monitor: BoundaryMonitor,
        settings: StepSettings,
        on_refresh: RefreshObserver | None = None,
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._selector = selector
        self._monitor = monitor
        self._settings = settings
        self._on_refresh = on_refresh

    def decode(self, state: DecodingState, limits: DecodeLimits) -> Iterator[StepRecord]:
        """Process what is unprocessed, then choose tokens until a limit.

        Args:
            state: Has at least one unprocessed id; changed as tokens are chosen. Between two
                yields, and when the iterator is closed, ids and keys are consistent.
            limits: When to end.

        Yields:
            One record per chosen token, already appended to `state.ids`.
        """
        sequence = state.sequence
        try:
            yield from self._steps(state, limits)
        finally:
            sequence.flush_segment()
            if not state.unprocessed:
                # A plugin raised between a step and the draw from it: the last id is pending
                # again, so that the caller can go on from it.
                sequence.cut(len(state.ids) - 1)

    def next_logits(self, state: DecodingState) -> Tensor:
        """Float32 `[vocabulary]` of the token after the last id; the state is left as it was."""
        sequence, todo = state.sequence, state.unprocessed
        before = sequence.processed_tokens
        try:
            output = self._runner.dense(sequence, todo)
        finally:
            sequence.cut(before)
        assert output is not None
        return output.logits

    def _steps(self, state: DecodingState, limits: DecodeLimits) -> Iterator[StepRecord]:
        settings = self._settings
        schedule = SegmentSchedule(settings.minimum_segment_tokens, settings.maximum_segment_tokens)
        segment_capacity = min(settings.maximum_segment_tokens, limits.max_new_tokens) + 1
        started = time.perf_counter()
        output = self._prefill(state, limits, segment_capacity)
        if output is None:
            return
        kind: StepKind = "slow"
        reason = "prefill"
        choice = self._choose(output, len(state.ids))
        for count in range(1, limits.max_new_tokens + 1):
            state.ids.append(choice.token_id)
            yield self._record(state, kind, reason, time.perf_counter() - started)
            if choice.token_id in limits.stop_ids or count == limits.max_new_tokens:
                return
            if limits.cancelled():
                return
            started = time.perf_counter()
            self._show_token(state, schedule, choice)
            kind, reason, choice = self._next(state, schedule, choice, segment_capacity)

    def _prefill(
        self, state: DecodingState, limits: DecodeLimits, segment_capacity: int
    ) -> StepOutput | None:
        todo = state.unprocessed
        rows = self._settings.prefill_evidence_queries if self._settings.sparse else 0
        output = self._runner.dense(
            state.sequence, todo, evidence_rows=rows, interrupted=limits.cancelled
        )
        if output is not None and self._settings.sparse:
            self._refresh(state, segment_capacity)
            self._monitor.reset(todo)
        return output

    def _next(
        self, state: DecodingState, schedule: SegmentSchedule, choice: Choice, capacity: int
    ) -> tuple[StepKind, str, Choice]:
        """Process the chosen token and draw the one after it."""
        token, position = choice.token_id, len(state.ids)
        if not self._settings.sparse:
            return "slow", "dense", self._choose(self._dense_step(state, token), position)
        reason = schedule.slow_reason()
        if reason is not None:
            return "slow", reason, self._slow(state, schedule, token, capacity)
        output = self._runner.fast(state.sequence, token, measure_mass=self._monitor.needs_mass)
        schedule.took_fast()
        drawn = self._choose(output, position)
        event = StepEvent(position - 1, drawn.entropy_nats, drawn.selected_mass)
        boundary = self._monitor.after_step(event)
        if boundary is not None and boundary.when == "now":
            # The draw is thrown away with the step; noise belongs to positions, so nothing moves.
            state.sequence.discard_fast_token()
            return "retry", boundary.reason, self._slow(state, schedule, token, capacity)
        if boundary is not None:
            schedule.report(boundary.reason)
        return "fast", "", drawn

    def _slow(
        self, state: DecodingState, schedule: SegmentSchedule, token: int, capacity: int
    ) -> Choice:
        state.sequence.flush_segment()
        output = self._dense_step(state, token)
        self._refresh(state, capacity)
        schedule.took_slow()
        return self._choose(output, len(state.ids))

    def _dense_step(self, state: DecodingState, token: int) -> StepOutput:
        rows = self._settings.evidence_queries if self._settings.sparse else 0
        output = self._runner.dense(state.sequence, [token], evidence_rows=rows)
        assert output is not None
        return output

    @torch.no_grad()
    def _refresh(self, state: DecodingState, segment_capacity: int) -> None:
        selections = refresh_memory(state.sequence, self._selector, segment_capacity)
        if self._on_refresh is not None:
            self._on_refresh(state.sequence.processed_tokens, selections)

    def _choose(self, output: StepOutput, position: int) -> Choice:
        """Draw on the device and read token, entropy and mass in one transfer."""
        numbers = [self._sampler.choose(output.logits, position).double()]
        if self._monitor.needs_entropy:
            numbers.append(entropy_nats(output.logits).double())
        if output.selected_mass is not None:
            numbers.append(output.selected_mass.double())
        token, *rest = torch.stack(numbers).tolist()
        entropy = rest.pop(0) if self._monitor.needs_entropy else None
        return Choice(int(token), entropy, rest.pop(0) if rest else None)

    def _show_token(self, state: DecodingState, schedule: SegmentSchedule, choice: Choice) -> None:
        if not self._settings.sparse:
            return
        position = len(state.ids) - 1
        boundary = self._monitor.after_token(choice.token_id, position, choice.entropy_nats)
        if boundary is not None:
            schedule.report(boundary.reason)

    def _record(
        self, state: DecodingState, kind: StepKind, reason: str, seconds: float
    ) -> StepRecord:
        layout = state.sequence.layout
        return StepRecord(
            kind=kind,
            slow_step=None if kind == "fast" or not self._settings.sparse else "observe",
            reason=reason,
            memory_tokens=self._memory_tokens(state),
            segment_tokens=layout.segment_tokens if layout is not None else 0,
            seconds=seconds,
            position=len(state.ids) - 1,
            token_id=state.ids[-1],
        )

    def _memory_tokens(self, state: DecodingState) -> int:
        layout = state.sequence.layout
        if layout is None or not layout.ready:
            return state.sequence.processed_tokens
        return layout.visible_tokens
