"""`never`: reports nothing. The baseline in which only the longest segment opens slow steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent

__all__ = ["Never", "NeverConfig"]


class NeverConfig(Settings):
    """Options of `never`: none."""


class Never:
    """Reports no boundary at all.

    What remains is `refresh.max_segment_tokens`, so an ablation against this detector shows what
    the boundaries of another one are worth beyond a fixed schedule.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: NeverConfig, tokenizer: Any = None) -> None:
        self._config = config

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """There is nothing to forget."""

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """No boundary."""
        return None

    def snapshot(self) -> None:
        """There is no state."""
        return None

    def restore(self, state: None) -> None:
        """There is no state."""
