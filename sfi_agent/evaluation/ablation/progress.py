"""How far an ablation is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["AblationProgress", "OnProgress"]


@dataclass(frozen=True, slots=True)
class AblationProgress:
    """A moment of an ablation.

    Attributes:
        stage: What is going on: "loading", "running", "recording" (details) or "writing".
        done: Units finished, those of earlier sittings included; failed ones count.
        total: Units planned: runs, and traces of the runs that are recorded.
        resumed: Units that were there at the start.
        failed: Runs that ended in an error.
        detail: The unit that was just finished, or what is being loaded.
    """

    stage: str
    done: int
    total: int
    resumed: int
    failed: int
    detail: str


OnProgress = Callable[[AblationProgress], None]
