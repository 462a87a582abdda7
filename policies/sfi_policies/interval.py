"""`interval`: a boundary every so many tokens. A fixed schedule, for ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent

__all__ = ["Interval", "IntervalConfig"]


class IntervalConfig(Settings):
    """Options of `interval`."""

    every_tokens: int = Field(
        default=64,
        ge=1,
        description="Number of tokens from one boundary to the next, counted from the start of "
        "the decoding.",
        json_schema_extra={"unit": "tokens"},
    )


class Interval:
    """Reports a boundary with every `every_tokens`-th token of a decoding.

    The count runs over all chosen tokens and is not restarted by slow steps of other causes, so
    the schedule does not depend on which detectors it is combined with. `fixed_periodic` in the
    ablations of Slow-Fast Inference (arXiv 2603.12038).
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: IntervalConfig, tokenizer: Any = None) -> None:
        self._every_tokens = config.every_tokens
        self._tokens = 0

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Count from zero; the prompt does not count."""
        self._tokens = 0

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary: the schedule counts tokens."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """A boundary when the count reaches a multiple of `every_tokens`."""
        self._tokens += 1
        if self._tokens % self._every_tokens:
            return None
        return Boundary(f"interval: {self._every_tokens} tokens")

    def snapshot(self) -> int:
        """The count."""
        return self._tokens

    def restore(self, state: int) -> None:
        """Set the count."""
        self._tokens = state
