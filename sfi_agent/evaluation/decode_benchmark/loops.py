"""Arms that are decodings: what a session does, without text, on every sequence of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfi_agent.engine.batch import BatchDecoding
from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.decoder import DecodeMoves, Decoder
from sfi_agent.engine.decoding_state import DecodeLimits, DecodingState, StepSettings
from sfi_agent.engine.requests import StepOutcome, StepRequest
from sfi_agent.engine.sampling import Sampler
from sfi_agent.evaluation.decode_benchmark.clock import Clock, Moment
from sfi_agent.evaluation.decode_benchmark.coin import CoinChooser
from sfi_agent.evaluation.decode_benchmark.records import DraftCounts
from sfi_agent.evaluation.decode_benchmark.sample import Sample
from sfi_agent.observe.trace import StepRecord
from sfi_agent.plugins import build_selector

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.engine.runner import Runner
    from sfi_agent.evaluation.decode_benchmark.histories import Histories

__all__ = ["DecodingArm"]

_OVERSHOOT_TOKENS = 64


class _Window:
    """The time in which all sequences decode: from the last of the first tokens until one sequence
    has all of its own. Tokens that others get from the same step count too.

    Args:
        clock: Reads the time.
        batch: Number of sequences.
        tokens: Tokens behind the first one that a sequence makes.
    """

    def __init__(self, clock: Clock, batch: int, tokens: int) -> None:
        self._clock = clock
        self._batch = batch
        self._wanted = tokens
        self._started = 0
        self.tokens = 0
        self.fast = 0
        self.memory_tokens = 0
        self.drafts = DraftCounts()
        self.first: Moment | None = None
        self.last: Moment | None = None
        self.closed = False

    @property
    def over(self) -> bool:
        """Whether every sequence should end now."""
        return self.last is not None

    def step(self) -> None:
        """A step begins: what it gives is too late for a window that is over."""
        self.closed = self.over

    def note(self, record: StepRecord, count: int) -> None:
        """A token was chosen, the `count`-th of its sequence."""
        if self.closed:
            return
        if count == 1:
            self._started += 1
            if self._started == self._batch:
                self.first = self._clock.glance()
            return
        if self.first is None:
            return
        self.tokens += 1
        if record.kind == "fast":
            self.fast += 1
            self.memory_tokens += record.memory_tokens
        if record.drafted_tokens:
            rejected = record.accepted_tokens < record.drafted_tokens
            judged = record.accepted_tokens + int(rejected)
            self.drafts = self.drafts.plus(
                DraftCounts(judged, record.accepted_tokens, 1, record.drafted_tokens)
            )
        if not self.over and count > self._wanted and record.kind != "fast":
            self.last = self._clock.glance()

    def sample(self) -> Sample:
        """Seconds per token of each sequence."""
        assert self.first is not None and self.last is not None, "a decoding ended early"
        each = self.tokens / self._batch
        span = self._clock.between(self.first, self.last).over(each)
        drafts = self.drafts if self.drafts.verifications else None
        return Sample(span, each, drafts, self.memory_tokens / self.fast if self.fast else 0.0)


class DecodingArm:
    """One policy, decoded by real decoders.

    Args:
        runner: Executes steps.
        histories: Where they start.
        config: From `arm_config`.
        tokens: Tokens behind the first one that a sample makes of each sequence.
        acceptance: See `DecodeOptions`.
        seed: Of the coin.
    """

    own_attention = True

    def __init__(
        self,
        runner: Runner,
        histories: Histories,
        config: SessionConfig,
        tokens: int,
        acceptance: float,
        seed: int,
    ) -> None:
        self._runner = runner
        self._histories = histories
        self._tokens = tokens
        sparse = config.mode == "slow_fast"
        self._states = histories.sparse if sparse else histories.dense
        self._verified = sparse and config.slow_step == "verify"
        self._config = config
        self._acceptance = acceptance
        self._seed = seed

    def sample(self) -> Sample:
        """See `TimedArm`."""
        clock = Clock(self._runner.shape.device)
        window = _Window(clock, len(self._states), self._tokens)
        limits = DecodeLimits(self._tokens + 1 + _OVERSHOOT_TOKENS, cancelled=lambda: window.over)
        decodings = [self._watched(state, limits, window) for state in self._states]

        def execute(requests: Sequence[StepRequest], batch: int, waiting: int) -> list[StepOutcome]:
            window.step()
            return self._runner.execute(requests, batch, waiting)

        try:
            BatchDecoding(decodings, execute).run()
        finally:
            self._histories.rewind()
        return window.sample()

    def _watched(self, state: DecodingState, limits: DecodeLimits, window: _Window) -> DecodeMoves:
        """The moves of a decoder; the window is told of every record."""
        moves = self._decoder().moves(state, limits)
        outcome: StepOutcome | None = None
        count = 0
        try:
            while True:
                move = moves.send(outcome)
                if isinstance(move, StepRecord):
                    count += 1
                    window.note(move, count)
                outcome = yield move
        except StopIteration:
            return
        finally:
            moves.close()

    @property
    def _sampler(self) -> Sampler:
        sampling = self._config.sampling
        return Sampler(sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)

    def _coins(self) -> tuple[CoinChooser, CoinChooser]:
        """Who chooses drafts, and who says which of them stand: another coin for every sequence
        and sample."""
        self._seed += 1
        size = self._runner.shape.vocabulary_size
        drafts = CoinChooser(self._sampler, size, self._seed)
        return drafts, CoinChooser(self._sampler, size, self._seed, self._acceptance)

    def _decoder(self) -> Decoder:
        """What a session makes of a policy without detectors."""
        config = self._config
        selector = build_selector(config.selector, default_seed=config.sampling.seed)
        monitor = BoundaryMonitor([], None)
        drafts, judge = self._coins() if self._verified else (None, None)
        return Decoder(
            self._runner,
            self._sampler,
            selector,
            monitor,
            _settings(config),
            draft_chooser=drafts,
            chooser=judge,
        )


def _settings(config: SessionConfig) -> StepSettings:
    """What a session hands to its decoder."""
    refresh = config.refresh
    return StepSettings(
        sparse=config.mode == "slow_fast",
        slow_step=config.slow_step,
        minimum_segment_tokens=refresh.min_segment_tokens,
        maximum_segment_tokens=refresh.max_segment_tokens,
        evidence_queries=refresh.evidence_queries,
        prefill_evidence_queries=refresh.prefill_evidence_queries,
        lag_tokens=refresh.lag,
    )
