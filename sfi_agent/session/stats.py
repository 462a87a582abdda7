"""What a session has done so far, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.observe.trace import StepRecord

__all__ = ["SessionStats"]


@dataclass(frozen=True, slots=True)
class SessionStats:
    """Numbers of a session so far; a rewind takes back what it removes.

    Attributes:
        generated_tokens: Tokens chosen and kept.
        fast_tokens: Drawn from steps over the memory (and verified, under verify).
        slow_tokens: Drawn from dense steps, the first token of each turn included.
        retry_tokens: Drawn from dense steps that replaced a fast one.
        dense_passes: Passes over the whole history: slow, retry and verifying steps, not prefills.
        slow_share: `dense_passes / generated_tokens`, 0 to 1, lower is cheaper.
        acceptance: Share of drafts that verification let stand, 0 to 1, higher is better; None
            where nothing was verified.
        history_tokens: Tokens whose keys and values are kept.
        history_bytes: Bytes of the history buffers (extents shared with a parent not counted).
        memory_bytes: Bytes of the memory buffers.
    """

    generated_tokens: int
    fast_tokens: int
    slow_tokens: int
    retry_tokens: int
    dense_passes: int
    slow_share: float
    acceptance: float | None
    history_tokens: int
    history_bytes: int
    memory_bytes: int

    @classmethod
    def of(
        cls,
        trace: Sequence[StepRecord],
        *,
        history_tokens: int,
        history_bytes: int,
        memory_bytes: int,
    ) -> SessionStats:
        """Count a trace."""
        kinds = [record.kind for record in trace]
        passes = sum(record.dense_passes for record in trace)
        drafted = sum(record.drafted_tokens for record in trace)
        accepted = sum(record.accepted_tokens for record in trace)
        return cls(
            generated_tokens=len(kinds),
            fast_tokens=kinds.count("fast"),
            slow_tokens=kinds.count("slow"),
            retry_tokens=kinds.count("retry"),
            dense_passes=passes,
            slow_share=passes / len(kinds) if kinds else 0.0,
            acceptance=accepted / drafted if drafted else None,
            history_tokens=history_tokens,
            history_bytes=history_bytes,
            memory_bytes=memory_bytes,
        )
