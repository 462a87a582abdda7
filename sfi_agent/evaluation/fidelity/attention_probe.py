"""Attention mass recalled by fast steps, and what the missing mass does to a layer's output.

Both compare one layer's attention over the memory with the same query's attention over all keys
of the history. The query is the one the fast step had, so a layer's numbers are its own and hold
nothing of the error of the layers below.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfi_agent.errors import InputError, explain

if TYPE_CHECKING:
    from torch import Tensor

    from sfi_agent.engine.instruments import FastAttention

__all__ = ["AttentionProbe", "AttentionSample", "attention_sample"]

_CHUNK_TOKENS = 8192
"""Keys and values are widened to float32 in pieces of this many tokens, to bound the copies."""


@dataclass(frozen=True, slots=True)
class AttentionSample:
    """One layer in one fast step.

    Attributes:
        layer: Index of the layer.
        position: Absolute position of the token that was processed.
        recall: Per query head the share of the dense attention's mass that lies on tokens the
            fast step sees, 0 to 1; higher is better.
        output_error: ||fast - dense|| / ||dense|| of the layer's attention output, all heads
            together, L2; lower is better.
    """

    layer: int
    position: int
    recall: tuple[float, ...]
    output_error: float


def attention_sample(attention: FastAttention) -> AttentionSample:
    """Compare a fast step's attention with dense attention of the same query, in float32.

    With logits l, recall = sum over visible tokens of exp(l) / sum over all tokens of exp(l).
    Cost: one pass over all keys and one over all values of the layer.
    """
    import torch

    keys, values = attention.all_keys_values()
    rows = attention.query[:, 0].float().reshape(keys.shape[0], -1, keys.shape[-1])
    rows = rows * attention.scale
    parts = keys.split(_CHUNK_TOKENS, dim=1)
    logits = torch.cat([_logits(attention, rows, part) for part in parts], dim=-1)
    mass = logits.logsumexp(-1, keepdim=True)
    # What sinks take is on no token: recall leaves it out, the output does not.
    lse = mass.flatten(0, 1)
    weights = (logits - attention.state.rule.total(lse).view_as(mass)).exp()
    dense = torch.zeros(*rows.shape[:2], values.shape[-1], device=values.device)
    for share, part in zip(
        weights.split(_CHUNK_TOKENS, dim=-1), values.split(_CHUNK_TOKENS, dim=1), strict=True
    ):
        dense += share @ part.float()
    error = torch.linalg.vector_norm(attention.output.float().reshape(dense.shape) - dense)
    relative = error / torch.linalg.vector_norm(dense).clamp(min=torch.finfo(dense.dtype).tiny)
    # One transfer for everything that is read from the device.
    *recall, output_error = torch.cat(
        [_visible_share(attention, rows, mass).flatten(), relative[None]]
    ).tolist()
    return AttentionSample(attention.layer, attention.position, tuple(recall), output_error)


def _logits(attention: FastAttention, rows: Tensor, keys: Tensor) -> Tensor:
    """Of scaled queries `[kv_heads, group, key_dim]`, as the model computes them."""
    return attention.state.rule.cap(rows @ keys.float().transpose(-1, -2))


def _visible_share(attention: FastAttention, rows: Tensor, mass: Tensor) -> Tensor:
    """`[kv_heads, group]`: share of `exp(mass)` on the keys that the step sees."""
    keys, visible = attention.visible_keys()
    logits = _logits(attention, rows, keys)
    seen = logits.masked_fill(~visible[:, None], float("-inf")).logsumexp(-1, keepdim=True)
    # Both sums are rounded, so a memory that misses nothing may come out a little above 1.
    return (seen - mass).exp().clamp(max=1.0)[..., 0]


class AttentionProbe:
    """Samples every n-th fast step; give it as `Instruments(on_fast_attention=...)`.

    Which steps are probed depends on their positions alone, so that all policies are probed at
    the same tokens.

    Args:
        every_steps: 1 probes every fast step. A probed step reads the whole history once per
            sparse layer, in float32: about as much work as a dense step.
        first_position: Position that the count starts from.

    Raises:
        InputError: `every_steps` is below 1.
    """

    def __init__(self, every_steps: int = 1, first_position: int = 0) -> None:
        if every_steps < 1:
            raise InputError(
                explain("probe fast steps", got=f"every {every_steps!r} steps", allowed="1 or more")
            )
        self._every_steps = every_steps
        self._first_position = first_position
        self._samples: dict[tuple[int, int], AttentionSample] = {}

    def __call__(self, attention: FastAttention) -> None:
        """Sample a layer of a fast step if the step's turn has come."""
        if (attention.position - self._first_position) % self._every_steps == 0:
            sample = attention_sample(attention)
            # A step that is run again (after a rejected draft) replaces the one before.
            self._samples[sample.position, sample.layer] = sample

    def samples(self, discarded_positions: Collection[int] = ()) -> list[AttentionSample]:
        """What was sampled, in order of position and layer.

        Args:
            discarded_positions: Positions whose fast step was thrown away and run densely
                instead; they are left out.
        """
        dropped = frozenset(discarded_positions)
        return [
            self._samples[key]
            for key in sorted(self._samples)
            if self._samples[key].position not in dropped
        ]
