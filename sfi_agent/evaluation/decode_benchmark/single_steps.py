"""Arms that are steps of one kind, one after the other, on every sequence of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    Drawing,
    FastStep,
    RefreshOrder,
    RefreshStep,
    StepOutcome,
    StepRequest,
)
from sfi_agent.engine.sampling import Sampler
from sfi_agent.evaluation.decode_benchmark.clock import Clock
from sfi_agent.evaluation.decode_benchmark.sample import Sample
from sfi_agent.plugins import build_selector

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.engine.runner import Runner
    from sfi_agent.engine.sequence import SequenceState
    from sfi_agent.evaluation.decode_benchmark.histories import Histories

__all__ = ["FastSteps", "SelectionAlone", "SlowSteps"]


class _Steps:
    """What these arms share.

    Args:
        runner: Executes steps.
        histories: Where they start.
        config: Of the arm "observe".
        steps: Steps per sample.
        segment_tokens: Fast tokens that a memory has room for.
    """

    own_attention = True

    def __init__(
        self,
        runner: Runner,
        histories: Histories,
        config: SessionConfig,
        steps: int,
        segment_tokens: int,
    ) -> None:
        self._runner = runner
        self._histories = histories
        self._steps = steps
        self._clock = Clock(runner.shape.device)
        sampling = config.sampling
        self._sampler = Sampler(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
        # One per sequence, as sessions have them.
        self._orders = [
            RefreshOrder(
                build_selector(config.selector, default_seed=sampling.seed), segment_tokens + 1
            )
            for _ in range(histories.batch)
        ]
        self._evidence_rows = config.refresh.evidence_queries

    @property
    def _sequences(self) -> list[SequenceState]:
        return [state.sequence for state in self._histories.sparse]

    def _execute(self, requests: Sequence[StepRequest]) -> list[StepOutcome]:
        return self._runner.execute(requests, self._histories.batch)

    def _drawing(self, sequence: SequenceState, tokens: int = 1) -> Drawing:
        return Drawing(self._sampler, sequence.processed_tokens + tokens)

    def _slow(self, tokens: Sequence[int]) -> list[int]:
        """One slow step of every sequence; the tokens they draw."""
        requests = [
            DenseStep(
                sequence,
                [token],
                self._drawing(sequence),
                evidence_rows=self._evidence_rows,
                refresh=order,
            )
            for sequence, token, order in zip(self._sequences, tokens, self._orders, strict=True)
        ]
        return [outcome.choice.token_id for outcome in self._execute(requests)]

    def _first_tokens(self) -> list[int]:
        for sequence in self._sequences:
            assert sequence.layout is not None
            sequence.layout.prompt_end = self._histories.context_tokens + 1
        return [state.ids[-1] for state in self._histories.sparse]


class SlowSteps(_Steps):
    """Dense steps with evidence, selection and gather, of all sequences at once."""

    def sample(self) -> Sample:
        """See `TimedArm`."""
        tokens = self._first_tokens()
        try:
            first = self._clock.now()
            for _ in range(self._steps):
                tokens = self._slow(tokens)
            span = self._clock.between(first, self._clock.now())
        finally:
            self._histories.rewind()
        return Sample(span.over(self._steps), self._steps)


class FastSteps(_Steps):
    """Fast steps behind an untimed slow one, as they follow each other within a segment."""

    def sample(self) -> Sample:
        """See `TimedArm`."""
        tokens = self._slow(self._first_tokens())
        seen = 0
        try:
            first = self._clock.now()
            for index in range(self._steps):
                tokens = self._fast(tokens, more=index + 1 < self._steps)
                seen += sum(sequence.visible_tokens for sequence in self._sequences)
            span = self._clock.between(first, self._clock.now())
        finally:
            for sequence in self._sequences:
                sequence.drop_segment()
            self._histories.rewind()
        visible = seen / self._steps / self._histories.batch
        return Sample(span.over(self._steps), self._steps, memory_tokens=visible)

    def _fast(self, tokens: Sequence[int], *, more: bool) -> list[int]:
        requests = [
            FastStep(sequence, token, self._drawing(sequence), may_continue=more)
            for sequence, token in zip(self._sequences, tokens, strict=True)
        ]
        return [outcome.choice.token_id for outcome in self._execute(requests)]


class SelectionAlone(_Steps):
    """A refresh from query rows that an untimed block has kept: evidence, selection and gather."""

    def sample(self) -> Sample:
        """See `TimedArm`."""
        blocks = [
            BlockStep(sequence, [token] * self._block, self._drawing(sequence))
            for sequence, token in zip(self._sequences, self._first_tokens(), strict=True)
        ]
        rows = max(0, self._block - self._evidence_rows), self._block
        try:
            self._execute(blocks)
            refreshes = [
                RefreshStep(sequence, *rows, order)
                for sequence, order in zip(self._sequences, self._orders, strict=True)
            ]
            first = self._clock.now()
            self._execute(refreshes)
            span = self._clock.between(first, self._clock.now())
        finally:
            self._histories.rewind()
        return Sample(span, 1)

    @property
    def _block(self) -> int:
        """Tokens of the block, which are as many as rectify processes again."""
        return self._steps
