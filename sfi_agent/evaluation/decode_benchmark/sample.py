"""One sample of an arm, and what arms have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sfi_agent.evaluation.decode_benchmark.clock import Span
from sfi_agent.evaluation.decode_benchmark.records import DraftCounts

__all__ = ["Sample", "TimedArm"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one sample.

    Attributes:
        span: Seconds per token of each sequence.
        tokens: Tokens per sequence that the time was divided by.
        drafts: What became of drafts; None where there are none.
        memory_tokens: What fast steps attended to on average; 0 where there were none.
    """

    span: Span
    tokens: float
    drafts: DraftCounts | None = None
    memory_tokens: float = 0.0


class TimedArm(Protocol):
    """An arm: `sample` takes its steps once and leaves the histories as they were.

    Attributes:
        own_attention: Whether the model's attention is switched to ours meanwhile.
    """

    own_attention: bool

    def sample(self) -> Sample: ...
