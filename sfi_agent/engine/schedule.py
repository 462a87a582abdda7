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

    With a lag the fast step that follows a boundary still happens: a device may have begun it
    before anybody looked at the token that reported the boundary.

    Attributes:
        minimum_tokens: Fast tokens a segment must have before a boundary ends it.
        maximum_tokens: Fast tokens after which a segment ends without a boundary.
        lag_tokens: Fast steps between a boundary and its slow step, 0 or 1.
        segment_tokens: Fast tokens since the last slow step.
        deferred_reason: The first boundary reported in this segment, if any.
        served_tokens: Fast tokens of the segment at which that boundary is served.
    """

    minimum_tokens: int
    maximum_tokens: int
    lag_tokens: int = 0
    segment_tokens: int = 0
    deferred_reason: str | None = None
    served_tokens: int = 0

    def report(self, reason: str) -> None:
        """A boundary after which the next step should be slow."""
        if self.deferred_reason is None:
            self.deferred_reason = reason
            self.served_tokens = max(self.minimum_tokens, self.segment_tokens + self.lag_tokens)

    def slow_reason(self) -> str | None:
        """Why the next step is slow, or None if it is fast."""
        if self.deferred_reason is not None and self.segment_tokens >= self.served_tokens:
            return self.deferred_reason
        if self.segment_tokens >= self.maximum_tokens:
            return "max_segment"
        return None

    def may_continue(self) -> bool:
        """Whether the fast step that comes now may be followed by another, as far as is known."""
        after = self.segment_tokens + 1
        due = self.deferred_reason is not None and after >= self.served_tokens
        return after < self.maximum_tokens and not due

    def took_fast(self) -> None:
        self.segment_tokens += 1

    def took_slow(self) -> None:
        self.segment_tokens = 0
        self.deferred_reason = None
