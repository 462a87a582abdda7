"""One benchmark: the model's sizes, where it runs, how long histories are, policy and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.decode_benchmark.options import DecodeOptions, position_room
from sfi_agent.evaluation.decode_benchmark.sizes import ModelSizes

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig

__all__ = ["Setting"]


@dataclass(frozen=True, slots=True)
class Setting:
    """See the module text.

    Attributes:
        sizes: Of the model.
        device: Where it runs.
        context_tokens: Length of each history.
        config: Sizes of the memory, selector and sampling.
        options: What is timed.
    """

    sizes: ModelSizes
    device: torch.device
    context_tokens: int
    config: SessionConfig
    options: DecodeOptions

    @property
    def room_tokens(self) -> int:
        """Room behind the context."""
        return position_room(self.options)

    @property
    def memory_tokens(self) -> int:
        """What a refresh puts into the memory of a sequence, where the history has as much."""
        memory = self.config.memory
        present = memory.sink_tokens + memory.recent_tokens
        return present + min(memory.selected_tokens, max(0, self.context_tokens - present))

    @property
    def on_host(self) -> bool:
        """Whether histories are in host memory, so that dense steps stream them."""
        return self.config.history.device == "cpu" and self.device.type == "cuda"

    @property
    def streamed_layers(self) -> int:
        """Layers whose history is in host memory."""
        return self.sizes.layers - len(self.config.memory.dense_layers) if self.on_host else 0

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            InputError: Naming it.
        """
        memory = self.config.memory
        present = memory.sink_tokens + memory.recent_tokens
        if self.context_tokens <= present:
            raise InputError(
                explain(
                    "benchmarked decoding",
                    got=f"a context of {self.context_tokens} tokens",
                    allowed=f"more than sink + recent = {present}",
                )
            )
        missing = [layer for layer in memory.dense_layers if layer >= self.sizes.layers]
        if missing:
            raise InputError(
                explain(
                    "benchmarked decoding",
                    got=f"memory.dense_layers {missing}",
                    allowed=f"0 to {self.sizes.layers - 1}",
                )
            )
