"""Attention supervision: which heads learn which role of `sources`, and the two losses for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SUPERVISION", "Supervised", "attention_source_loss", "rms_norm", "telling_loss"]


@dataclass(frozen=True, slots=True)
class Supervised:
    """Which heads of which layer learn a role of `sources`.

    Attributes:
        layer: Index of the layer.
        heads: Query heads, each trained to do the same.
        together: Whether the mass on all targets counts (the model may choose), or each target
            is to get an equal share.
        tells: Whether what the heads write must also tell which token the target is.
    """

    layer: int
    heads: tuple[int, ...]
    together: bool = True
    tells: bool = False


SUPERVISION: dict[str, Supervised] = {
    "back1": Supervised(0, (0,)),
    "back2": Supervised(0, (1,)),
    "back3": Supervised(0, (2,)),
    "bind": Supervised(1, (0, 1), tells=True),
    "plan": Supervised(2, (0, 1)),
    "name": Supervised(2, (2, 3), tells=True),
    "value": Supervised(3, (0, 1, 2, 3), tells=True),
    "spread": Supervised(3, (0, 1, 2, 3), together=False),
    "missing": Supervised(3, (0, 1, 2, 3)),
}


def rms_norm(hidden: Tensor, norm: Any) -> Tensor:
    """What a Qwen3 norm module computes, as one fused operator."""
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def attention_source_loss(
    queries: Tensor,
    keys: Tensor,
    heads: tuple[int, ...],
    rows: Tensor,
    targets: Tensor,
    *,
    together: bool,
) -> Tensor:
    """How little attention the given rows pay to their targets, in nats; lower is better.

    Args:
        queries: `[batch, heads, tokens, head_dim]` after rotary embedding, unscaled.
        keys: `[batch, kv_heads, tokens, head_dim]` after rotary embedding.
        heads: Query heads that are asked.
        rows: `[batch, rows]` int64 query positions.
        targets: `[batch, rows, targets]` int64 key positions, -1 where there is none; a row
            without any target does not count.
        together: Minus the logarithm of the summed attention mass if true, otherwise the mean of
            minus the logarithm of each target's mass.

    Returns:
        Mean over rows and heads, a scalar in float32; 0 without rows.
    """
    size, group = queries.shape[-1], queries.shape[1] // keys.shape[1]
    asked = queries[:, list(heads)]
    index = rows[:, None, :, None].expand(-1, len(heads), -1, size)
    chosen = asked.gather(2, index)
    own = keys[:, [head // group for head in heads]]
    logits = (chosen @ own.transpose(2, 3)).float() * size**-0.5
    future = torch.arange(keys.shape[2], device=rows.device) > rows[:, :, None]
    shares = logits.masked_fill(future[:, None], -1e9).log_softmax(-1)
    wanted = targets[:, None].expand(-1, len(heads), -1, -1)
    there = wanted >= 0
    found = shares.gather(3, wanted.clamp(min=0))
    if together:
        lost = -found.masked_fill(~there, -1e9).logsumexp(-1)
    else:
        lost = -(found * there).sum(-1) / there.sum(-1).clamp(min=1)
    counts = there.any(-1)
    total: Tensor = (lost * counts).sum() / counts.sum().clamp(min=1)
    return total


def telling_loss(
    network: Any,
    layer: Any,
    mixed: Tensor,
    heads: tuple[int, ...],
    rows: Tensor,
    targets: Tensor,
    ids: Tensor,
) -> Tensor:
    """Cross-entropy, in nats, of reading the first target's token off what the heads write.

    The heads' part of the residual stream is read like the network's last state, by the final
    norm and the embeddings. Without this, heads that look at a name learn to write that there is
    a name, not which.
    """
    size = mixed.shape[-1]
    index = rows[:, None, :, None].expand(-1, len(heads), -1, size)
    chosen = mixed[:, list(heads)].gather(2, index)
    columns = layer.self_attn.o_proj.weight.unflatten(1, (-1, size))[:, list(heads)]
    written = chosen.transpose(1, 2).flatten(2) @ columns.flatten(1).T
    logits = network.lm_head(rms_norm(written.float(), network.model.norm)).float()
    first = targets[..., 0]
    tokens = ids.gather(1, first.clamp(min=0)).masked_fill(first < 0, -100)
    total = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    share: Tensor = total / (first >= 0).sum().clamp(min=1)
    return share
