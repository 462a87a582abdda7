"""Decides the kind of the next step: boundaries, deferral, segment limits."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SegmentSchedule"]


@dataclass(slots=True)
class SegmentSchedule:
    """Counts a segment and remembers a boundary that came too early.

    A boundary inside the first `minimum_tokens` of a segment is deferred, not dropped: the slow
    step comes as soon as the segment is long enough. Several events within one gap are one. A
    slow step of any cause clears a deferred event.

    Attributes:
        minimum_tokens: Fast tokens a segment must have before a boundary ends it.
        maximum_tokens: Fast tokens after which a segment ends without a boundary.
        segment_tokens: Fast tokens since the last slow step.
        deferred_reason: The first boundary reported in this segment, if any.
    """

    minimum_tokens: int
    maximum_tokens: int
    segment_tokens: int = 0
    deferred_reason: str | None = None

    def report(self, reason: str) -> None:
        """A boundary after which the next step should be slow."""
        if self.deferred_reason is None:
            self.deferred_reason = reason

    def slow_reason(self) -> str | None:
        """Why the next step is slow, or None if it is fast."""
        if self.deferred_reason is not None and self.segment_tokens >= self.minimum_tokens:
            return self.deferred_reason
        if self.segment_tokens >= self.maximum_tokens:
            return "max_segment"
        return None

    def took_fast(self) -> None:
        self.segment_tokens += 1

    def took_slow(self) -> None:
        self.segment_tokens = 0
        self.deferred_reason = None
