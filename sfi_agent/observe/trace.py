"""One record per generated and kept token: which kind of step it came from, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SlowStepKind", "StepKind", "StepRecord"]

StepKind = Literal["fast", "slow", "retry"]
SlowStepKind = Literal["observe", "rectify", "verify"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """How one token came to be.

    Attributes:
        kind: "fast" read the memory, "slow" the whole history; "retry" is a slow step that
            replaced a fast one of the same token.
        slow_step: The session's kind of slow step; None on fast steps and in mode dense.
        reason: Why the step was slow, such as "prefill" or a detector's reason; "" on fast steps.
        memory_tokens: Tokens per KV head that fast steps can attend to after this step, averaged
            over sparse layers and heads; the whole history in mode dense.
        segment_tokens: Tokens since the last slow step, this one included.
        seconds: Wall-clock time of the step.
        position: Absolute position of the token in the sequence.
        token_id: The token.
        dense_passes: Passes over the whole history that this token cost, prefills not counted:
            1 for slow and retry steps, and for the last token of drafts that a verification at
            the end of a decoding let stand.
        drafted_tokens: Drafts that this token's pass verified; 0 without verify.
        accepted_tokens: How many of them stood.
    """

    kind: StepKind
    slow_step: SlowStepKind | None
    reason: str
    memory_tokens: int
    segment_tokens: int
    seconds: float
    position: int
    token_id: int
    dense_passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
