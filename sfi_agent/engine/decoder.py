"""The decoding state machine: prefill, then slow and fast steps until a stop.

    dense prefill of everything unprocessed, refresh
      -> choose a token -> detectors see it -> kind of the next step
           slow: close the segment, dense step, refresh
           fast: step over the memory -> detectors see the step
                   "now": discard it, run the same token densely, refresh (a retry)

Under verify the tokens of fast steps are drafts: see `engine/drafting.py`. Every decoding starts
with a dense prefill of at least the pending token, so no selection outlives a turn. Ids and keys
stay consistent when a step raises or the caller stops listening.

The machine itself is a generator that yields requests and records: `Decoder.decode` executes the
requests of one sequence, `engine/batch.py` those of many together.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TypeAlias

from torch import Tensor

from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.decoding_state import Choice, DecodeLimits, DecodingState, StepSettings
from sfi_agent.engine.draft_length import DraftLength
from sfi_agent.engine.drafting import Drafter
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.requests import Moves, StepOutcome, StepRequest
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sampling import GivenTokens, Sampler
from sfi_agent.engine.schedule import SegmentSchedule
from sfi_agent.engine.steps import Steps
from sfi_agent.observe.trace import StepKind, StepRecord
from sfi_agent.protocols import Selector

__all__ = ["DecodeMoves", "Decoder"]

DecodeMoves: TypeAlias = Generator[StepRequest | StepRecord, StepOutcome | None, None]
"""A whole decoding: requests are answered with outcomes, records with None."""


class Decoder:
    """Decodes one sequence under one policy.

    Args:
        runner: Executes forward passes.
        sampler: Chooses tokens.
        selector: Fills the memory; unused in mode dense.
        monitor: The boundary detectors; unused in mode dense.
        settings: See `StepSettings`.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        selector: Selector,
        monitor: BoundaryMonitor,
        settings: StepSettings,
    ) -> None:
        self.runner = runner
        self.steps = Steps(runner.prefill_chunk_tokens, sampler, selector, monitor, settings)
        self._sampler = sampler
        self._settings = settings

    def attach(self, instruments: Instruments) -> None:
        """Let these functions look on from now on, in place of earlier ones."""
        self.steps.instruments = instruments

    def decode(self, state: DecodingState, limits: DecodeLimits) -> Iterator[StepRecord]:
        """Process what is unprocessed, then choose tokens until a limit.

        Args:
            state: Has at least one unprocessed id; changed as tokens are chosen. Between two
                yields ids are consistent, and when the iterator is closed keys are too.
            limits: When to end.

        Yields:
            One record per chosen token, already appended to `state.ids`.
        """
        moves = self.moves(state, limits)
        outcome: StepOutcome | None = None
        try:
            while True:
                move = moves.send(outcome)
                if isinstance(move, StepRecord):
                    outcome = None
                    yield move
                else:
                    outcome = self.runner.execute([move])[0]
        except StopIteration:
            return
        finally:
            moves.close()

    def moves(self, state: DecodingState, limits: DecodeLimits) -> DecodeMoves:
        """The same decoding for somebody who executes its requests.

        Whatever ends it, `close()` on the generator brings ids and keys into their state between
        decodings.
        """
        settings = self._settings
        verified = settings.sparse and settings.slow_step == "verify"
        self.steps.chooser = self._sampler
        if limits.given_ids:
            self.steps.chooser = GivenTokens(len(state.ids), limits.given_ids, self._sampler)
        # Drafts are the policy's own, also where somebody else says which of them stand.
        self.steps.draft_chooser = self._sampler if verified else self.steps.chooser
        schedule = SegmentSchedule(
            settings.minimum_segment_tokens, settings.maximum_segment_tokens, settings.lag_tokens
        )
        try:
            if verified:
                yield from self._decode_verified(state, limits, schedule)
            else:
                yield from self._decode_directly(state, limits, schedule)
        finally:
            self.steps.close(state)

    def next_logits(self, state: DecodingState) -> Tensor:
        """Float32 `[vocabulary]` of the token after the last id; the state is left as it was."""
        sequence, todo = state.sequence, state.unprocessed
        before = sequence.processed_tokens
        try:
            return self.runner.process(sequence, todo).logits
        finally:
            sequence.cut(before)

    def _decode_directly(
        self, state: DecodingState, limits: DecodeLimits, schedule: SegmentSchedule
    ) -> DecodeMoves:
        capacity = self._segment_capacity(limits)
        started = time.perf_counter()
        choice = yield from self.steps.prefill(state, limits, capacity)
        if choice is None:
            return
        kind: StepKind = "slow"
        reason = "prefill"
        for count in range(1, limits.max_new_tokens + 1):
            yield self._keep(state, choice, kind, reason, time.perf_counter() - started)
            if limits.ends_with(choice.token_id, count) or limits.cancelled():
                return
            started = time.perf_counter()
            self._show_token(state, schedule, choice)
            more = count + 1 < limits.max_new_tokens
            kind, reason, choice = yield from self._next(state, schedule, choice, capacity, more)

    def _next(
        self,
        state: DecodingState,
        schedule: SegmentSchedule,
        choice: Choice,
        capacity: int,
        more: bool,
    ) -> Moves[tuple[StepKind, str, Choice]]:
        """Process the chosen token and draw the one after it; `more` may follow that."""
        if not self._settings.sparse:
            return "slow", "dense", (yield from self.steps.dense(state, may_continue=more))
        reason = schedule.slow_reason()
        if reason is not None:
            schedule.took_slow()
            return "slow", reason, (yield from self.steps.slow(state, capacity))
        drawn, boundary = yield from self.steps.fast(
            state,
            choice.token_id,
            len(state.ids) - 1,
            may_continue=more and schedule.may_continue(),
        )
        if boundary is not None and boundary.when == "now":
            # The draw is thrown away with the step; noise belongs to positions, so nothing moves.
            state.sequence.discard_fast_token()
            schedule.took_slow()
            return "retry", boundary.reason, (yield from self.steps.slow(state, capacity))
        schedule.took_fast()
        if boundary is not None:
            schedule.report(boundary.reason)
        return "fast", "", drawn

    def _decode_verified(
        self, state: DecodingState, limits: DecodeLimits, schedule: SegmentSchedule
    ) -> DecodeMoves:
        capacity = self._segment_capacity(limits)
        length = DraftLength(schedule.minimum_tokens, schedule.maximum_tokens)
        started = time.perf_counter()
        choice = yield from self.steps.prefill(state, limits, capacity)
        if choice is None:
            return
        yield self._keep(state, choice, "slow", "prefill", time.perf_counter() - started)
        count = 1
        drafter = Drafter(self.steps, schedule)
        while not limits.ends_with(choice.token_id, count) and not limits.cancelled():
            schedule.maximum_tokens = length.tokens()
            draft = yield from drafter.draft(state, choice, count, limits)
            if draft is None:
                return
            started = time.perf_counter()
            verdict = yield from self.steps.verify(
                state, draft.token_ids, capacity, closing=draft.closing
            )
            seconds = time.perf_counter() - started
            length.note(len(draft.tokens), verdict.accepted)
            drafter.settle(draft, verdict.accepted)
            for record in drafter.records(state, draft, verdict, seconds):
                state.ids.append(record.token_id)
                state.prompt_start = len(state.ids) - 1
                count += 1
                yield record
                if limits.cancelled():
                    return
            if verdict.choice is None:
                return
            choice = verdict.choice

    def _keep(
        self, state: DecodingState, choice: Choice, kind: StepKind, reason: str, seconds: float
    ) -> StepRecord:
        """Make a chosen token part of the sequence."""
        on_logits = self.steps.instruments.on_logits
        if on_logits is not None and choice.logits is not None:
            on_logits(len(state.ids), choice.logits)
        state.ids.append(choice.token_id)
        state.prompt_start = len(state.ids) - 1
        layout, sparse = state.sequence.layout, self._settings.sparse
        return StepRecord(
            kind=kind,
            slow_step=None if kind == "fast" or not sparse else self._settings.slow_step,
            reason=reason,
            memory_tokens=state.sequence.visible_tokens,
            segment_tokens=layout.segment_tokens if layout is not None else 0,
            seconds=seconds,
            position=len(state.ids) - 1,
            token_id=choice.token_id,
            dense_passes=int(kind != "fast" and reason != "prefill"),
        )

    def _show_token(self, state: DecodingState, schedule: SegmentSchedule, choice: Choice) -> None:
        if not self._settings.sparse:
            return
        position = len(state.ids) - 1
        boundary = self.steps.monitor.after_token(choice.token_id, position, choice.entropy_nats)
        if boundary is not None:
            schedule.report(boundary.reason)

    def _segment_capacity(self, limits: DecodeLimits) -> int:
        return min(self._settings.maximum_segment_tokens, limits.max_new_tokens) + 1
