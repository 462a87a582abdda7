"""`answer_start`: the first token of an answer is processed densely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent

__all__ = ["AnswerStart", "AnswerStartConfig"]


class AnswerStartConfig(Settings):
    """`answer_start` has no options."""


class AnswerStart:
    """Has the first fast step of a decoding run again densely.

    The first token of an answer is drawn from the prefill, whose evidence is the question. Where a
    sentence's facts are looked up from its first token, as sentence detectors assume, the first
    sentence is the only one that no slow step at its own first token selects for. This detector
    gives it one: a boundary "now", which waits for no minimum segment and costs one dense pass per
    answer. Measured in docs/policy_study.md.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: AnswerStartConfig, tokenizer: Any = None) -> None:
        self._first = True

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """The next step is the first of an answer."""
        self._first = True

    def after_step(self, event: StepEvent) -> Boundary | None:
        """A boundary "now" at the first fast step."""
        first, self._first = self._first, False
        return Boundary("answer_start: first token", when="now") if first else None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """No boundary: the step that processes the token decides."""
        return None

    def snapshot(self) -> bool:
        """Whether the first step is still to come."""
        return self._first

    def restore(self, state: bool) -> None:
        """Set whether the first step is still to come."""
        self._first = state
