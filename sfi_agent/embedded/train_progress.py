"""What a training run consists of, where it stands, and what it says about itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Meter", "Phase", "Progress"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of the training.

    Attributes:
        name: Shown in the log, part of the name of its data.
        lengths: Document lengths in tokens, one batch of each in turn.
        seconds: Time spent on training steps.
        batch_tokens: Tokens per step.
        rate_start, rate_end: Learning rate at both ends, linear in time between them.
        entropy_weight: Weight of the mean attention entropy (nats) in the loss.
    """

    name: str
    lengths: tuple[int, ...]
    seconds: float
    batch_tokens: int
    rate_start: float
    rate_end: float
    entropy_weight: float = 0.0


@dataclass
class Progress:
    """Where a run stands; saved with the weights."""

    phase: int = 0
    phase_seconds: float = 0.0
    phase_batches: int = 0
    steps: int = 0
    tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


class Meter:
    """Mean loss and speed between two lines of the log."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._losses: list[Tensor] = []
        self._entropies: list[Tensor] = []
        self._tokens = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def add(self, loss: Tensor, entropy: Tensor, tokens: int) -> None:
        self._losses.append(loss)
        self._entropies.append(entropy)
        self._tokens += tokens

    def report(self, state: Progress) -> dict[str, Any]:
        return {
            "steps": state.steps,
            "million_tokens": round(state.tokens / 1e6, 1),
            "loss": round(float(torch.stack(self._losses).mean()), 5),
            "attention_entropy": round(float(torch.stack(self._entropies).mean()), 3),
            "tokens_per_second": round(self._tokens / self.elapsed),
        }
