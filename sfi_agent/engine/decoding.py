"""One decoding from its prefill to its end: which step comes next, token by token.

Tokens are either chosen directly, by fast and slow steps, or drafted and verified
(`engine/drafting.py`): all of them under verify, and under any policy those that the watch of the
decoding wants exact. A stretch of exact tokens begins with a slow step, which closes the segment
before it, so that what it holds from then on are drafts alone.
"""

from __future__ import annotations

import time

from sfi_agent.engine.decoding_state import Choice, DecodeLimits, DecodingState, StepSettings
from sfi_agent.engine.draft_length import DraftLength
from sfi_agent.engine.drafting import Drafter
from sfi_agent.engine.requests import DecodeMoves, Moves
from sfi_agent.engine.sampling import GivenTokens, Sampler, TokenChooser
from sfi_agent.engine.schedule import SegmentSchedule
from sfi_agent.engine.steps import Steps
from sfi_agent.observe.trace import StepKind, StepRecord

__all__ = ["LONGEST_EXACT_DRAFT", "Decoding"]

LONGEST_EXACT_DRAFT = 15
"""Drafts of an exact stretch at most, unless everything is verified. Stretches are short, and so
their blocks come in few sizes, which a warm-up can prepare."""


class Decoding:
    """Decodes one sequence once.

    Args:
        steps: The policy's steps; nobody else decodes with them meanwhile.
        settings: The policy's numbers.
        sampler: Chooses tokens that are not given.
        state: Has at least one unprocessed id; changed as tokens are chosen.
        limits: When to end.
        choosers: Who chooses drafts, and everything else that is not given.
    """

    def __init__(
        self,
        steps: Steps,
        settings: StepSettings,
        sampler: Sampler,
        state: DecodingState,
        limits: DecodeLimits,
        choosers: tuple[TokenChooser, TokenChooser],
    ) -> None:
        self._steps = steps
        self._settings = settings
        self._sampler = sampler
        self._draft_chooser, self._chooser = choosers
        self._state = state
        self._limits = limits
        shortest, longest = settings.minimum_segment_tokens, settings.maximum_segment_tokens
        self._capacity = min(longest, limits.max_new_tokens) + 1
        self._schedule = SegmentSchedule(shortest, longest, settings.lag_tokens)
        if not settings.verifies:
            shortest, longest = (min(bound, LONGEST_EXACT_DRAFT) for bound in (shortest, longest))
        self._draft_length = DraftLength(shortest, longest)
        self._draft_schedule = SegmentSchedule(shortest, longest, settings.lag_tokens)
        self._drafter = Drafter(steps, self._draft_schedule, exact_only=not settings.verifies)
        self._count = 0
        self._choice: Choice | None = None
        self._stopped = False
        self._drafts = settings.verifies
        self._opened = False

    def moves(self) -> DecodeMoves:
        """The whole decoding. Whatever ends it, `close()` on the generator brings ids and keys
        into their state between decodings."""
        steps, state, limits = self._steps, self._state, self._limits
        steps.watch = limits.watch
        steps.chooser = self._chooser
        if limits.given_ids:
            steps.chooser = GivenTokens(len(state.ids), limits.given_ids, self._sampler)
        try:
            limits.watch.start(state.ids)
            started = time.perf_counter()
            choice = yield from steps.prefill(state, limits, self._capacity)
            if choice is None:
                return
            yield self._keep(choice, "slow", "prefill", time.perf_counter() - started)
            while not self._over():
                if self._drafts:
                    yield from self._verified_segment()
                else:
                    yield from self._directly()
        finally:
            steps.close(state, drafting=self._drafts)

    @property
    def _exact(self) -> bool:
        return self._settings.sparse and self._limits.watch.exact

    @property
    def _pending(self) -> Choice:
        assert self._choice is not None, "the prefill chooses a token first"
        return self._choice

    def _over(self) -> bool:
        ended = self._limits.ends_with(self._pending.token_id, self._count)
        return self._stopped or ended or self._limits.cancelled()

    def _directly(self) -> DecodeMoves:
        """Process the pending token and choose the one behind it."""
        started = time.perf_counter()
        self._show_pending()
        kind, reason, choice = yield from self._next()
        yield self._keep(choice, kind, reason, time.perf_counter() - started)

    def _next(self) -> Moves[tuple[StepKind, str, Choice]]:
        state, steps, schedule = self._state, self._steps, self._schedule
        more = self._count + 1 < self._limits.max_new_tokens
        if not self._settings.sparse:
            return "slow", "dense", (yield from steps.dense(state, may_continue=more))
        reason = self._limits.watch.reason if self._opened else schedule.slow_reason()
        if reason is not None:
            schedule.took_slow()
            return "slow", reason, (yield from steps.slow(state, self._capacity))
        steps.draft_chooser = steps.chooser
        drawn, boundary = yield from steps.fast(
            state,
            self._pending.token_id,
            len(state.ids) - 1,
            may_continue=more and schedule.may_continue(),
        )
        if boundary is not None and boundary.when == "now":
            # The draw is thrown away with the step; noise belongs to positions, so nothing moves.
            state.sequence.discard_fast_token()
            schedule.took_slow()
            return "retry", boundary.reason, (yield from steps.slow(state, self._capacity))
        schedule.took_fast()
        if boundary is not None:
            schedule.report(boundary.reason)
        return "fast", "", drawn

    def _verified_segment(self) -> DecodeMoves:
        """Draft behind the pending token, verify, and keep what stands and a token behind it."""
        state, steps, limits = self._state, self._steps, self._limits
        # Drafts are the policy's own, also where somebody else says which of them stand.
        steps.draft_chooser = self._draft_chooser
        self._draft_schedule.maximum_tokens = self._draft_length.tokens()
        draft = yield from self._drafter.draft(state, self._pending, self._count, limits)
        if draft is None:
            self._stopped = True
            return
        started = time.perf_counter()
        verdict = yield from steps.verify(
            state, draft.token_ids, draft.allowed, self._capacity, closing=draft.closing
        )
        seconds = time.perf_counter() - started
        self._draft_length.note(len(draft.tokens), verdict.accepted)
        self._drafter.settle(draft, verdict.accepted)
        for record in self._drafter.records(state, draft, verdict, seconds):
            state.ids.append(record.token_id)
            state.prompt_start = len(state.ids) - 1
            self._count += 1
            yield record
            if limits.cancelled():
                self._stopped = True
                return
        if verdict.choice is None:
            self._choice = draft.tokens[-1].choice
        else:
            self._note(verdict.choice)

    def _keep(self, choice: Choice, kind: StepKind, reason: str, seconds: float) -> StepRecord:
        """Make a chosen token part of the sequence."""
        state, sparse = self._state, self._settings.sparse
        on_logits = self._steps.instruments.on_logits
        if on_logits is not None and choice.logits is not None:
            on_logits(len(state.ids), choice.logits)
        state.ids.append(choice.token_id)
        state.prompt_start = len(state.ids) - 1
        self._count += 1
        self._note(choice)
        layout = state.sequence.layout
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

    def _note(self, choice: Choice) -> None:
        """Tell the watch of the pending token, and see what it asks for behind it."""
        before = self._exact
        self._limits.watch.note(choice.token_id)
        self._choice = choice
        if not self._settings.verifies:
            self._opened = self._exact and not before
            self._drafts = self._exact and before

    def _show_pending(self) -> None:
        """Let the detectors see the pending token."""
        if not self._settings.sparse:
            return
        choice = self._pending
        boundary = self._steps.monitor.after_token(
            choice.token_id, len(self._state.ids) - 1, choice.entropy_nats
        )
        if boundary is not None:
            self._schedule.report(boundary.reason)
