"""A real model whose outputs are written by the test: keys and values are real, choices are not.

Greedy decoding behind `Script` yields the given texts, one per turn, whatever the model thinks.
So tool loops, stop tokens and malformed calls can be tested on models without training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Script"]


class Script:
    """Forces what a model says, position by position; use it as a context manager.

    Args:
        model: A causal language model of transformers.
        outputs: Token ids of each turn, its stop token included.
    """

    def __init__(self, model: Any, outputs: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._waiting = [token for output in outputs for token in output]
        self._given: dict[int, int] = {}
        self._prefilled_to: int | None = None
        self._handle: Any = None

    def __enter__(self) -> Script:
        self._handle = self._model.register_forward_hook(self._overwrite, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    @property
    def left(self) -> int:
        """Scripted tokens that nobody has asked for yet."""
        return len(self._waiting)

    def _overwrite(self, module: Any, args: Any, kwargs: Any, result: Any) -> Any:
        # A retry asks for the same position again and gets the same token. Chunks of a prefill
        # but the last ask too; what they are given is taken back when a later chunk follows.
        positions = kwargs["position_ids"][0]
        first, last = int(positions[0]), int(positions[-1])
        if result.logits.shape[1] > 1:
            return self._overwrite_block(positions.tolist(), result)
        for position in [item for item in self._given if item >= first and item != last]:
            self._waiting.insert(0, self._given.pop(position))
        if first - 1 == self._prefilled_to and len(positions) > 1:
            if self._given.get(first - 1) not in (None, int(kwargs["input_ids"][0, 0])):
                self._waiting.insert(0, self._given.pop(first - 1))
        self._prefilled_to = last if len(positions) > 1 else None
        if last not in self._given and self._waiting:
            self._given[last] = self._waiting.pop(0)
        logits = torch.full_like(result.logits, -30.0)
        logits[0, -1, self._given.get(last, 0)] = 30.0
        result.logits = logits
        return result

    def _overwrite_block(self, positions: list[int], result: Any) -> Any:
        """Drafts are judged: every row asks, and those whose token was drafted get it again."""
        logits = torch.full_like(result.logits, -30.0)
        for row, position in enumerate(positions[-logits.shape[1] :]):
            if position not in self._given and self._waiting:
                self._given[position] = self._waiting.pop(0)
            logits[0, row, self._given.get(position, 0)] = 30.0
        result.logits = logits
        return result
