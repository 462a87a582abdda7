"""Slow, plain references that the engine is tested against. Nothing here uses the engine's code.

Dense decoding is transformers' own forward over all ids. Slow-fast decoding is *one* forward over
all ids as well: every token is processed exactly once in the end (a retried fast step leaves
nothing behind), so what step each token was processed by is a mask: row i of layer l and head h
sees exactly the positions that the step of token i was allowed to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfi_agent.observe.trace import StepRecord
from sfi_agent.protocols import Selection

__all__ = [
    "Refresh",
    "ReferenceRun",
    "VisibilityRules",
    "dense_logits",
    "masked_run",
    "visibility_masks",
]

REFERENCE_ATTENTION = "sfi_test_reference"


@torch.no_grad()
def dense_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits after every id, `[tokens, vocabulary]` float32, by transformers' own forward.

    The mask of ones says that no id is padding, whatever `pad_token_id` is.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    result = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    logits: Tensor = result.logits[0].float()
    return logits


@dataclass(frozen=True)
class Refresh:
    """What a session selected, and when.

    Attributes:
        tokens: Length of the history at the refresh.
        selections: Per layer; None where a layer selects nothing.
    """

    tokens: int
    selections: list[Selection | None]


@dataclass(frozen=True)
class VisibilityRules:
    """The parts of a policy and a model that decide what a step sees.

    Attributes:
        sink_tokens: As configured.
        recent_tokens: As configured.
        windows: Per layer the sliding window in tokens, or None.
        dense_layers: As configured.
        kv_heads: Of every layer.
    """

    sink_tokens: int
    recent_tokens: int
    windows: tuple[int | None, ...]
    dense_layers: frozenset[int]
    kv_heads: int


def visibility_masks(
    rules: VisibilityRules, total: int, trace: Sequence[StepRecord], refreshes: Sequence[Refresh]
) -> list[Tensor]:
    """What every token could see, from the kinds in a trace and the recorded selections.

    A record tells of the step that its token was drawn from, which processed the token before it.

    Returns:
        Per layer `[kv_heads, total, total]` bool, row by column.
    """
    fast_rows = [record.position - 1 for record in trace if record.kind == "fast"]
    masks = []
    for index, window in enumerate(rules.windows):
        row, column = torch.arange(total)[:, None], torch.arange(total)[None]
        visible = column <= row
        if window is not None:
            visible = visible & (column > row - window)
        mask = visible.expand(rules.kv_heads, -1, -1).clone()
        if window is None and index not in rules.dense_layers:
            for fast_row in fast_rows:
                refresh = [entry for entry in refreshes if entry.tokens <= fast_row][-1]
                mask[:, fast_row] = _fast_row(rules, total, fast_row, index, refresh)
        masks.append(mask)
    return masks


def _fast_row(rules: VisibilityRules, total: int, row: int, layer: int, refresh: Refresh) -> Tensor:
    """`[kv_heads, total]`: sink, selected, and everything from the recent start to the row."""
    sink = min(rules.sink_tokens, refresh.tokens)
    recent_start = max(sink, refresh.tokens - rules.recent_tokens)
    visible = torch.zeros(rules.kv_heads, total, dtype=torch.bool)
    visible[:, :sink] = True
    visible[:, recent_start : row + 1] = True
    selection = refresh.selections[layer]
    if selection is not None:
        for head in range(rules.kv_heads):
            count = int(selection.counts[0, head])
            visible[head, selection.positions[0, head, :count].cpu()] = True
    return visible


@dataclass
class ReferenceRun:
    """A forward under given masks, and what its layers computed.

    Attributes:
        logits: `[tokens, vocabulary]` float32, row i after token i.
        queries: Per layer `[query_heads, tokens, dim]`, post-RoPE, on the CPU.
        keys: Per layer `[kv_heads, tokens, dim]`, post-RoPE, on the CPU.
        scales: Per layer the factor of the attention logits.
        softcaps: Per layer their soft-cap, 0 for none.
        sinks: Per layer the logits of its sinks, `[query_heads]`, or None.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    softcaps: list[float] = field(default_factory=list)
    sinks: list[Tensor | None] = field(default_factory=list)


@dataclass
class _Masks:
    """Handed through the model to the reference attention as a keyword."""

    masks: list[Tensor]
    run: ReferenceRun


def _reference_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    reference: _Masks,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention by the book, in float32, under the mask of the layer."""
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    reference.run.queries.append(query[0].cpu())
    reference.run.keys.append(key[0].cpu())
    reference.run.scales.append(scale)
    reference.run.softcaps.append(softcap or 0.0)
    reference.run.sinks.append(None if s_aux is None else s_aux.cpu())
    visible = reference.masks[module.layer_idx].to(query.device).repeat_interleave(group, 0)
    keys = key[0].float().repeat_interleave(group, 0)
    values = value[0].float().repeat_interleave(group, 0)
    logits = torch.einsum("hqd,hkd->hqk", query[0].float(), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float()[:, None, None].expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(-1)[..., : keys.shape[1]]
    out = torch.einsum("hqk,hkd->qhd", weights, values)
    return out[None].to(query.dtype), None


@torch.no_grad()
def masked_run(model: Any, ids: Sequence[int], masks: list[Tensor]) -> ReferenceRun:
    """One forward over all ids in which every row sees what its mask says.

    The model must not be in use by open sessions.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(REFERENCE_ATTENTION, _reference_attention)
    previous = model.config._attn_implementation
    run = ReferenceRun()
    model.set_attn_implementation(REFERENCE_ATTENTION)
    try:
        tokens = torch.tensor([list(ids)], device=model.device)
        result = model(input_ids=tokens, use_cache=False, reference=_Masks(masks, run))
    finally:
        model.set_attn_implementation(previous)
    run.logits = result.logits[0].float()
    return run
