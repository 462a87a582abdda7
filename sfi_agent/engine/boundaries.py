"""All detectors of a sequence behind one object: the decoder asks it, it asks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sfi_agent.errors import PluginError, explain
from sfi_agent.protocols import Boundary, BoundaryDetector, StepEvent, TokenEvent

__all__ = ["BoundaryMonitor", "PieceSource"]


class PieceSource(Protocol):
    """Turns ids into running text; the engine does not know how."""

    def start(self, prompt_ids: Sequence[int]) -> str:
        """Begin behind these ids and return their text."""
        ...

    def feed(self, token_id: int) -> str:
        """The text a token adds; empty while a character is incomplete."""
        ...

    def snapshot(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class BoundaryMonitor:
    """Merges the reports of several detectors: any of them opens a slow step.

    Args:
        detectors: By the name the configuration gives them; the first report in this order gives
            the reason.
        pieces: Required when a detector needs "text".
    """

    def __init__(
        self, detectors: Sequence[tuple[str, BoundaryDetector]], pieces: PieceSource | None
    ) -> None:
        self._detectors = tuple(detectors)
        needs = frozenset().union(*(detector.needs for _, detector in self._detectors))
        self.needs_text = "text" in needs
        self.needs_entropy = "entropy" in needs
        self.needs_mass = "attention_drift" in needs
        if self.needs_text:
            assert pieces is not None, "detectors that need text need a source of it"
        self._pieces = pieces

    def reset(self, prompt_ids: Sequence[int]) -> None:
        """Start over behind the ids that were just prefilled."""
        text = self._pieces.start(prompt_ids) if self.needs_text and self._pieces else ""
        for _, detector in self._detectors:
            detector.reset(prompt_ids, text)

    def after_step(self, event: StepEvent) -> Boundary | None:
        """Ask every detector about a fast step; a "now" outranks a "next"."""
        found: Boundary | None = None
        for name, detector in self._detectors:
            boundary = self._checked(name, detector.after_step(event))
            if boundary is not None and (found is None or found.when == "next"):
                better = found is None or boundary.when == "now"
                found = self._named(name, boundary) if better else found
        return found

    def after_token(
        self, token_id: int, position: int, entropy_nats: float | None
    ) -> Boundary | None:
        """Show the chosen token to every detector; the first report wins."""
        text = self._pieces.feed(token_id) if self.needs_text and self._pieces else ""
        event = TokenEvent(token_id, position, text, entropy_nats)
        found: Boundary | None = None
        for name, detector in self._detectors:
            boundary = self._checked(name, detector.after_token(event))
            if boundary is None:
                continue
            if boundary.when == "now":
                raise PluginError(
                    explain(
                        f"detector {name!r} reported a boundary after a token",
                        got="when='now'",
                        allowed="when='next'; 'now' only from after_step, before a token is chosen",
                    ),
                    plugin=name,
                )
            found = found or self._named(name, boundary)
        return found

    def snapshot(self) -> Any:
        """The state of every detector and of the running text."""
        pieces = self._pieces.snapshot() if self.needs_text and self._pieces else None
        return tuple(detector.snapshot() for _, detector in self._detectors), pieces

    def restore(self, state: Any) -> None:
        """Return to a state that `snapshot` gave."""
        states, pieces = state
        for (_, detector), saved in zip(self._detectors, states, strict=True):
            detector.restore(saved)
        if self.needs_text and self._pieces:
            self._pieces.restore(pieces)

    @staticmethod
    def _checked(name: str, reported: Boundary | None) -> Boundary | None:
        """What a detector reported, if it is something a detector may report."""
        if reported is None:
            return None
        usable = isinstance(reported, Boundary) and isinstance(reported.reason, str)
        if not usable or reported.when not in ("now", "next"):
            raise PluginError(
                explain(
                    f"detector {name!r} reported something that is not a boundary",
                    got=repr(reported),
                    allowed="None, or a Boundary with a text as reason and when='now' or 'next'",
                    remedy="run sfi_agent.testing's contract test on it",
                ),
                plugin=name,
            )
        return reported

    @staticmethod
    def _named(name: str, boundary: Boundary) -> Boundary:
        """Reasons in a trace begin with the detector's configured name."""
        if boundary.reason.split(":")[0].strip() == name:
            return boundary
        return Boundary(f"{name}: {boundary.reason}", boundary.when)
