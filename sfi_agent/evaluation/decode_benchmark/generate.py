"""The arm that everybody has: `generate` of transformers with its own cache and attention."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfi_agent.evaluation.decode_benchmark.clock import Clock, Moment
from sfi_agent.evaluation.decode_benchmark.needs import free_bytes
from sfi_agent.evaluation.decode_benchmark.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfi_agent.evaluation.decode_benchmark.histories import Histories

__all__ = ["GenerateArm", "no_room_for_generate"]

_SPARE_SHARE = 0.05


def no_room_for_generate(histories: Histories, device: torch.device) -> str | None:
    """Why the arm cannot run, or None: its cache is a second copy of all histories, and for a
    moment of each step one layer has a third."""
    if histories.host_bytes:
        return "the histories are in host memory, and transformers' cache would be on the device"
    layers = len(histories.sparse[0].sequence.layers)
    needed = histories.history_bytes * (1 + 1 / layers) * (1 + _SPARE_SHARE)
    free = free_bytes(device)
    if free is None or needed <= free:
        return None
    return (
        f"transformers' cache is a second copy of the histories and takes {needed / 1e9:.1f} GB; "
        f"{free / 1e9:.1f} GB are free"
    )


class GenerateArm:
    """`model.generate` with a DynamicCache that holds the histories, greedy, attention "sdpa".

    The cache appends by concatenation, so that every step reads and writes all of it: that is what
    generate does without further options.

    Args:
        model: Its attention is its own while samples are taken.
        histories: Copied into the cache.
        tokens: Tokens behind the first one that a sample makes of each sequence.
    """

    own_attention = False

    def __init__(self, model: PreTrainedModel, histories: Histories, tokens: int) -> None:
        self._model: Any = model
        self._histories = histories
        self._tokens = tokens
        # transformers 5.24 gave it a new name.
        names = inspect.signature(type(model).forward).parameters
        self._keyword = "cache" if "cache" in names else "past_key_values"

    @torch.no_grad()
    def sample(self) -> Sample:
        """See `TimedArm`."""
        from transformers import StoppingCriteriaList

        states = self._histories.sparse
        device = states[0].sequence.layers[0].history.extents[0].buffer.keys.device
        clock = Clock(device)
        watch = _Watch(clock, self._tokens + 1)
        ids = torch.tensor([state.ids for state in states], device=device)
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._tokens + 1,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
            **{self._keyword: self._cache()},
        )
        assert watch.first is not None and watch.last is not None, "generate ended early"
        span = clock.between(watch.first, watch.last)
        return Sample(span.over(self._tokens), self._tokens)

    def _cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        layers = [state.sequence.layers for state in self._histories.sparse]
        for index, same in enumerate(zip(*layers, strict=True)):
            pieces = [next(layer.history.pieces()) for layer in same]
            keys = torch.stack([piece.keys for piece in pieces])
            values = torch.stack([piece.values for piece in pieces])
            cache.update(keys, values, index)
        return cache


class _Watch:
    """Reads the clock at the first token and at the last; stops nothing.

    Args:
        clock: Reads the time.
        tokens: Tokens that are generated.
    """

    def __init__(self, clock: Clock, tokens: int) -> None:
        self._clock = clock
        self._tokens = tokens
        self._count = 0
        self.first: Moment | None = None
        self.last: Moment | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Called by generate behind every token."""
        self._count += 1
        if self._count == 1:
            self.first = self._clock.now()
        if self._count == self._tokens:
            self.last = self._clock.now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
