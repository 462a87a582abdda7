"""How a layer turns products of queries and keys into attention weights, and the plain form of it.

Most models scale the products and take a softmax. Some bound the logits by a soft-cap (Gemma 2),
some let every head give part of its attention to nothing, a sink (gpt-oss). torch's attention
kernels know neither inside the softmax; sinks can be added behind it, from log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sfi_agent.observe.log import log_event

__all__ = ["AttentionRule", "tiled_attention"]

_TILE_TOKENS = 4096
_TILE_NUMBERS = 1 << 24
"""Logits of one tile at most, all heads and rows together: 64 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRule:
    """See the module text.

    Attributes:
        scale: Factor of the logits.
        softcap: Logits become `softcap * tanh(logits / softcap)`; 0 leaves them.
        sinks: `[query_heads]`, per head a logit that takes part in the softmax and has no token
            and no value; None where there are none.
    """

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the softmax of scaled products and nothing else."""
        return not self.softcap and self.sinks is None

    def cap(self, logits: Tensor) -> Tensor:
        """Scaled logits under the soft-cap, in place."""
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def total(self, lse: Tensor) -> Tensor:
        """Log-sum-exps of tokens and sinks together.

        Args:
            lse: `[..., query_heads, rows]` float32, of the tokens.
        """
        return lse if self.sinks is None else torch.logaddexp(lse, self.sinks.float()[:, None])

    def share(self, out: Tensor, lse: Tensor) -> Tensor:
        """Outputs of a softmax over tokens alone, less what the sinks take.

        Args:
            out: `[query_heads, rows, value_dim]`.
            lse: `[query_heads, rows]` float32.
        """
        if self.sinks is None:
            return out
        return (out.float() * (lse - self.total(lse)).exp()[..., None]).to(out.dtype)

    def grouped_sinks(self, kv_heads: int) -> Tensor | None:
        """`[kv_heads, group]` float32."""
        return None if self.sinks is None else self.sinks.float().view(kv_heads, -1)


def tiled_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: AttentionRule,
    *,
    causal: bool = False,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over tokens with log-sum-exps, in float32 and one tile of keys at a time.

    Args:
        query: `[heads, rows, key_dim]`.
        keys: `[heads, tokens, key_dim]`.
        values: `[heads, tokens, value_dim]`.
        rule: Its sinks are not in the result.
        causal: Whether row i sees tokens 0 to i only.
        visible: What else limits what a row sees: bool, broadcast to `[heads, rows, tokens]` and
            with all tokens on its last axis. Every row sees something.

    Returns:
        Outputs `[heads, rows, value_dim]` in the dtype of `query`, and log-sum-exps
        `[heads, rows]` float32.
    """
    _tell(query.device.type, str(query.dtype), bool(rule.softcap))
    (heads, rows), tokens = query.shape[:2], keys.shape[1]
    scaled = query.float() * rule.scale
    peak = scaled.new_full((heads, rows, 1), -torch.inf)
    total, mixed = torch.zeros_like(peak), scaled.new_zeros(heads, rows, values.shape[-1])
    size = max(1, min(_TILE_TOKENS, _TILE_NUMBERS // (heads * rows)))
    for low in range(0, tokens, size):
        tile = slice(low, low + size)
        logits = rule.cap(torch.matmul(scaled, keys[:, tile].float().mT))
        if causal:
            logits.masked_fill_(_later(rows, low, logits), -torch.inf)
        if visible is not None:
            logits.masked_fill_(~visible[..., tile], -torch.inf)
        higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
        # A row that has seen nothing yet has no peak to subtract.
        offset = torch.where(higher == -torch.inf, 0.0, higher)
        weights, shrink = logits.sub_(offset).exp_(), (peak - offset).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True)
        mixed = mixed * shrink + torch.matmul(weights, values[:, tile].float())
        peak = higher
    return (mixed / total).to(query.dtype), (total.log() + peak)[..., 0]


@cache
def _tell(device: str, dtype: str, capped: bool) -> None:
    """Why no faster kernel runs, once per combination."""
    reason = "tiles of float32: " + ("a soft-cap" if capped else "sinks beside a mask")
    log_event("debug", "attention_kernel_chosen", device=device, dtype=dtype, reason=reason)


def _later(rows: int, low: int, logits: Tensor) -> Tensor:
    """Which tokens of a tile come after which rows, `[rows, tile]` bool."""
    row = torch.arange(rows, device=logits.device)[:, None]
    return torch.arange(low, low + logits.shape[-1], device=logits.device) > row
