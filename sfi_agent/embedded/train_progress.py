"""What a training run consists of, where it stands, and what it says about itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sfi_agent.embedded.network import ForwardResult

__all__ = ["Meter", "Phase", "Progress", "Shape"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of batch.

    Attributes:
        tokens: Length of each document.
        documents: Documents per batch.
        log_share: Least and greatest share of a document that is the log.
        missing_share: Share of the facts that the log does not state.
        last_position: Documents are stretched up to this position; 0 leaves them as they are.
    """

    tokens: int
    documents: int
    log_share: tuple[float, float]
    last_position: int = 0
    missing_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of the training.

    Attributes:
        name: Shown in the log, part of the name of its data.
        shapes: Kinds of batches, taken in turn.
        batches: Number of steps.
        rate_start, rate_end: Learning rate at both ends, linear between them.
        source_weight: Weight of the attention supervision in the loss.
        low_precision: Whether matrix products run in bfloat16.
    """

    name: str
    shapes: tuple[Shape, ...]
    batches: int
    rate_start: float
    rate_end: float
    source_weight: float
    low_precision: bool = True


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    phase: int = 0
    phase_batches: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Meter:
    """Means and speed between two lines of the log."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._losses: list[float] = []
        self._right: list[float] = []
        self._sources: dict[str, list[float]] = {}
        self._tokens = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def add(self, result: ForwardResult, tokens: int) -> None:
        self._losses.append(float(result.loss.detach()))
        self._right.append(float(result.right.float().mean()) if result.right.numel() else 1.0)
        for role, lost in result.sources.items():
            self._sources.setdefault(role, []).append(float(lost.detach()))
        self._tokens += tokens

    def report(self, state: Progress) -> dict[str, Any]:
        return {
            "steps": state.steps,
            "million_tokens": round(state.tokens / 1e6, 2),
            "loss": _mean(self._losses, 5),
            "right": _mean(self._right, 5),
            "sources": {role: _mean(values, 4) for role, values in self._sources.items()},
            "tokens_per_second": round(self._tokens / self.elapsed),
        }


def _mean(values: list[float], digits: int) -> float:
    return round(float(torch.tensor(values).mean()), digits)
