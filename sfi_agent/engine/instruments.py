"""Looking at a decoding from outside, for reports, metrics and tests, without changing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.sequence import LayerState
from sfi_agent.protocols import Selection

__all__ = ["FastAttention", "Instruments"]


@dataclass(frozen=True, slots=True)
class FastAttention:
    """The attention of one layer in one fast step, while the step runs.

    Attributes:
        layer: Index of the layer.
        position: Absolute position of the token that is being processed.
        query: `[query_heads, 1, key_dim]`, post-RoPE.
        output: `[query_heads, 1, value_dim]`, what attention over the memory gave.
        state: History and memory of the layer; the token's own key and value are in the memory.
    """

    layer: int
    position: int
    query: Tensor
    output: Tensor
    state: LayerState

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.state.rule.scale

    def all_keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every token up to this one: `[kv_heads, tokens, dim]` each, a copy."""
        memory = self.state.memory
        assert memory is not None
        past = self.state.history.joined(0, self.state.history.tokens)
        keys, values = memory.segment(memory.layout.segment_tokens + 1)
        # The past may be in host memory.
        before = past.keys.to(keys.device), past.values.to(values.device)
        return torch.cat([before[0], keys], dim=1), torch.cat([before[1], values], dim=1)

    def visible_keys(self) -> tuple[Tensor, Tensor]:
        """The memory's keys `[kv_heads, capacity, key_dim]` and which of them this token sees,
        `[kv_heads, capacity]` bool."""
        memory = self.state.memory
        assert memory is not None
        return memory.keys, memory.visible()


@dataclass(frozen=True, slots=True)
class Instruments:
    """Functions that are told what a decoding does; None costs nothing.

    They run between or inside steps and must change nothing. What they raise ends the decoding.

    Attributes:
        on_logits: Called for every kept token, before it is yielded, with its position and the
            logits it was chosen from (`[vocabulary]` float32 on the device). Under verify these
            are the dense ones.
        on_refresh: Called after every refresh with the history length and, per layer, the
            selection (None where a layer has no memory or nothing was there to choose from).
        on_fast_attention: Called for every sparse layer of every fast step.
    """

    on_logits: Callable[[int, Tensor], None] | None = None
    on_refresh: Callable[[int, list[Selection | None]], None] | None = None
    on_fast_attention: Callable[[FastAttention], None] | None = None
