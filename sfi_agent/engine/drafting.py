"""Drafts: the tokens of fast steps where they must be exact, until a slow step has judged them.

    pending token -> fast step -> draft -> fast step -> draft -> ... -> verify
                                                                   accepted | rejected

A draft is no part of the sequence: neither ids nor history hold it, and nobody outside sees it.
Detectors do see it, because their boundaries end the segment, and so does whoever watches the
decoding; what they saw of rejected drafts is taken back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sfi_agent.engine.decoding_state import Choice, DecodeLimits, DecodingState
from sfi_agent.engine.requests import Moves
from sfi_agent.engine.schedule import SegmentSchedule
from sfi_agent.engine.steps import Steps, Verdict
from sfi_agent.observe.trace import StepKind, StepRecord
from sfi_agent.protocols import StepEvent

__all__ = ["Draft", "DraftToken", "Drafter"]


@dataclass(frozen=True, slots=True)
class DraftToken:
    """A token drawn from a fast step.

    Attributes:
        choice: The token, and what was read with it.
        event: What the detectors were told of the step.
        memory_tokens, segment_tokens, seconds: As in `StepRecord`.
    """

    choice: Choice
    event: StepEvent
    memory_tokens: int
    segment_tokens: int
    seconds: float


@dataclass(slots=True)
class Draft:
    """The drafts of one segment, and why they are verified now.

    Attributes:
        before: The detectors' state before they saw the pending token.
        watched: The watch's state after it saw the pending token.
        pending: The token that the first fast step processed.
        position: Where the pending token stands.
        tokens: In order.
        allowed: Per token what it was drawn from, and then what the one behind them may be drawn
            from (see `TokenWatch.allowed`); not asked for where the last draft is `closing`.
        kind: "retry" when a detector asked for the last token to be run again densely.
        reason: As in `StepRecord`.
        closing: Whether the last draft ends the decoding if it stands.
    """

    before: Any
    watched: Any
    pending: Choice
    position: int
    tokens: list[DraftToken] = field(default_factory=list)
    allowed: list[Tensor | None] = field(default_factory=list)
    kind: StepKind = "slow"
    reason: str = ""
    closing: bool = False

    @property
    def token_ids(self) -> list[int]:
        return [token.choice.token_id for token in self.tokens]


class Drafter:
    """Drafts segments, and tells detectors and records what became of them.

    Args:
        steps: The policy's steps.
        schedule: Says when a segment ends.
        exact_only: Whether drafts end where the watch says that tokens need not be exact.
    """

    def __init__(self, steps: Steps, schedule: SegmentSchedule, *, exact_only: bool) -> None:
        self._steps = steps
        self._schedule = schedule
        self._exact_only = exact_only

    def draft(
        self, state: DecodingState, pending: Choice, count: int, limits: DecodeLimits
    ) -> Moves[Draft | None]:
        """Take fast steps until something asks for a slow one.

        Args:
            state: Its last id is the pending token; the memory is ready.
            pending: The choice of that token.
            count: Tokens of the decoding so far, the pending one included.
            limits: They end the segment.

        Returns:
            The drafts; None when cancelled, which leaves nothing of them.
        """
        monitor, watch = self._steps.monitor, self._steps.watch
        draft = Draft(monitor.snapshot(), watch.snapshot(), pending, len(state.ids) - 1)
        token, position = pending, draft.position
        while True:
            self._show(token, position)
            draft.allowed.append(watch.allowed())
            if (reason := self._slow_reason()) is not None:
                draft.reason = reason
                return draft
            if limits.cancelled():
                return None
            started = time.perf_counter()
            more = count + len(draft.tokens) + 1 < limits.max_new_tokens
            drawn, boundary = yield from self._steps.fast(
                state,
                token.token_id,
                position,
                may_continue=more and self._schedule.may_continue(),
            )
            if boundary is not None and boundary.when == "now":
                state.sequence.discard_fast_token()
                draft.kind, draft.reason = "retry", boundary.reason
                return draft
            self._schedule.took_fast()
            if boundary is not None:
                self._schedule.report(boundary.reason)
            event = StepEvent(position, drawn.entropy_nats, drawn.selected_mass)
            draft.tokens.append(self._drafted(state, drawn, event, started))
            watch.note(drawn.token_id)
            token, position = drawn, position + 1
            drafted = count + len(draft.tokens)
            if limits.ends_with(drawn.token_id, drafted):
                full = drafted >= limits.max_new_tokens
                draft.reason, draft.closing = "max_new_tokens" if full else "stop_id", True
                return draft

    def settle(self, draft: Draft, accepted: int) -> None:
        """The drafts are verified: a new segment begins, and rejected ones were never seen.

        What detectors report about drafts that they see again was heard the first time.
        """
        self._schedule.took_slow()
        if accepted == len(draft.tokens):
            return
        monitor, watch, position = self._steps.monitor, self._steps.watch, draft.position
        monitor.restore(draft.before)
        watch.restore(draft.watched)
        monitor.after_token(draft.pending.token_id, position, draft.pending.entropy_nats)
        for token in draft.tokens[:accepted]:
            position += 1
            watch.note(token.choice.token_id)
            monitor.after_step(token.event)
            monitor.after_token(token.choice.token_id, position, token.choice.entropy_nats)

    def records(
        self, state: DecodingState, draft: Draft, verdict: Verdict, seconds: float
    ) -> Iterator[StepRecord]:
        """Records of the tokens that the verification let stand, and of the one it drew."""
        on_logits = self._steps.instruments.on_logits
        ended, drafted = verdict.choice is None, len(draft.tokens)
        for index, token in enumerate(draft.tokens[: verdict.accepted]):
            position = draft.position + 1 + index
            if on_logits is not None:
                on_logits(position, verdict.logits[index])
            last = ended and index == verdict.accepted - 1
            yield StepRecord(
                kind="fast",
                slow_step=None,
                reason="",
                memory_tokens=token.memory_tokens,
                segment_tokens=token.segment_tokens,
                seconds=token.seconds + (seconds if last else 0.0),
                position=position,
                token_id=token.choice.token_id,
                dense_passes=int(last),
                drafted_tokens=drafted if last else 0,
                accepted_tokens=verdict.accepted if last else 0,
            )
        if verdict.choice is None:
            return
        position = draft.position + 1 + verdict.accepted
        if on_logits is not None and verdict.choice.logits is not None:
            on_logits(position, verdict.choice.logits)
        yield StepRecord(
            kind=draft.kind,
            slow_step="verify",
            reason=draft.reason,
            memory_tokens=state.sequence.visible_tokens,
            segment_tokens=0,
            seconds=seconds,
            position=position,
            token_id=verdict.choice.token_id,
            dense_passes=1,
            drafted_tokens=drafted,
            accepted_tokens=verdict.accepted,
        )

    def _slow_reason(self) -> str | None:
        """Why the drafts are verified now, if they are."""
        watch = self._steps.watch
        if self._exact_only and not watch.exact:
            return f"{watch.reason}_end"
        return self._schedule.slow_reason()

    def _show(self, token: Choice, position: int) -> None:
        boundary = self._steps.monitor.after_token(token.token_id, position, token.entropy_nats)
        if boundary is not None:
            self._schedule.report(boundary.reason)

    @staticmethod
    def _drafted(
        state: DecodingState, drawn: Choice, event: StepEvent, started: float
    ) -> DraftToken:
        layout = state.sequence.layout
        assert layout is not None
        return DraftToken(
            choice=drawn,
            event=event,
            memory_tokens=layout.visible_tokens,
            segment_tokens=layout.segment_tokens,
            seconds=time.perf_counter() - started,
        )
