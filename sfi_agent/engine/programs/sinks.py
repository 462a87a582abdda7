"""Attention sinks behind the step kernels, which compute a softmax over tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.kernels import EvidenceBuffers

__all__ = ["evidence_with_sinks", "sink_part"]


def sink_part(rule: AttentionRule, out: Tensor, lse: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What `merge_parts` takes beside attention over tokens: mass without a value.

    Args:
        rule: Of the layer.
        out: `[batch, queries, query_heads, value_dim]`, of some tokens.
        lse: `[batch, query_heads, queries]` float32.

    Returns:
        One part; none where the layer has no sinks.
    """
    if rule.sinks is None:
        return []
    return [(torch.zeros_like(out), rule.sinks.float()[:, None].expand_as(lse))]


def evidence_with_sinks(rule: AttentionRule, buffers: EvidenceBuffers, lse: Tensor) -> Tensor:
    """Count what sinks take as mass outside the candidates, in place.

    Args:
        rule: Of the layer.
        buffers: Just written by its attention.
        lse: `[batch, query_heads, queries]` float32, of the tokens.

    Returns:
        Log-sum-exps of tokens and sinks, like `lse`.
    """
    if rule.sinks is None:
        return lse
    total = rule.total(lse)
    rest = buffers.rest_mass
    kept = (lse - total).exp()[..., lse.shape[-1] - buffers.queries :]
    kept = kept.unflatten(1, (rest.shape[1], -1)).transpose(2, 3).reshape(rest.shape)
    rest.mul_(kept).add_(1.0 - kept)
    return total
