"""What goes into a decoding and comes out of its steps, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.token_watch import UNWATCHED, TokenWatch
from sfi_agent.observe.trace import SlowStepKind

__all__ = ["Choice", "DecodeLimits", "DecodingState", "StepSettings"]


@dataclass(slots=True)
class DecodingState:
    """A sequence as the decoder leaves it: ids, keys and values.

    Attributes:
        ids: Every token of the sequence, raw. The last ones may be unprocessed.
        sequence: Keys and values of the processed ones; between decodings all of them are final,
            which under rectify and verify means that they are those of dense processing.
        prompt_start: Where the next decoding's prompt begins: at the pending token that the last
            one left. Unprocessed ids before it are the tail of a segment that rectify dropped;
            they are processed once more, but are no news to detectors and selector.
        processed_ahead: How many tokens of the next prompt are processed already.
    """

    ids: list[int]
    sequence: SequenceState
    prompt_start: int = 0
    processed_ahead: int = 0

    @property
    def unprocessed(self) -> list[int]:
        return self.ids[self.sequence.processed_tokens :]

    @property
    def prompt_tokens(self) -> int:
        """Length of the next decoding's prompt."""
        before = self.sequence.processed_tokens - self.processed_ahead
        return len(self.ids) - max(self.prompt_start, before)

    def keep(self, tokens: int) -> None:
        """Forget everything but the first `tokens` ids."""
        del self.ids[tokens:]
        self.prompt_start = min(self.prompt_start, max(0, tokens - 1))
        if self.sequence.processed_tokens > tokens:
            self.sequence.cut(tokens)
            self.processed_ahead = 0


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """When a decoding ends.

    Attributes:
        max_new_tokens: At most so many tokens are appended, at least 1.
        stop_ids: Choosing one of these ends the decoding; it is the last token returned.
        given_ids: The first tokens, taken as given instead of chosen; none of them is a stop.
        cancelled: Asked between steps; true ends the decoding.
        watch: Follows the tokens and says where they must be exact, or restricted.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    given_ids: tuple[int, ...] = ()
    cancelled: Callable[[], bool] = field(default=lambda: False)
    watch: TokenWatch = UNWATCHED

    def ends_with(self, token_id: int, count: int) -> bool:
        """Whether a token that is the `count`-th of the decoding, from 1, ends it."""
        stops = token_id in self.stop_ids and count > len(self.given_ids)
        return stops or count >= self.max_new_tokens


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What the decoder takes from a configuration.

    Attributes:
        sparse: False in mode dense, where every step is a dense one.
        slow_step: What a slow step does with the segment before it.
        minimum_segment_tokens: See `SegmentSchedule`.
        maximum_segment_tokens: See `SegmentSchedule`.
        evidence_queries: Query rows a slow step hands to the selector.
        prefill_evidence_queries: Query rows a prefill hands to the selector.
        lag_tokens: See `SegmentSchedule`.
    """

    sparse: bool
    slow_step: SlowStepKind
    minimum_segment_tokens: int
    maximum_segment_tokens: int
    evidence_queries: int
    prefill_evidence_queries: int
    lag_tokens: int = 0

    @property
    def verifies(self) -> bool:
        """Whether every token of a fast step is a draft."""
        return self.sparse and self.slow_step == "verify"


@dataclass(frozen=True, slots=True)
class Choice:
    """A token drawn from a step's logits, and what was read from the device with it.

    Attributes:
        token_id: The token.
        entropy_nats: Entropy of the whole distribution; None unless a detector needs it.
        selected_mass: See `Runner.fast`; None unless a detector needs it.
        logits: What it was drawn from, on the device; None unless an instrument wants them.
    """

    token_id: int
    entropy_nats: float | None
    selected_mass: float | None
    logits: Tensor | None
