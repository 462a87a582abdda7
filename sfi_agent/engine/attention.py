"""The attention function that transformers calls while slow-fast sessions are open.

It is registered once under `ATTENTION_NAME` and told what to do by the keyword `sfi`, a
`StepContext` that the runner passes to `model(...)` and transformers hands down to every layer.
It appends the new keys and values itself and builds its own causal view, so the model is called
without a cache and without a mask: what a layer sees depends on nothing but the context. Steps that
are compiled and captured come as a `ProgramContext` and are attended by the step kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfi_agent.engine.attention_checks import (
    check_finite,
    refuse_keywords,
    refuse_other_views,
)
from sfi_agent.engine.attention_rule import AttentionRule, tiled_attention
from sfi_agent.engine.history import LayerHistory, Piece
from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.instruments import FastAttention
from sfi_agent.engine.program_attention import ProgramContext, attend_in_program
from sfi_agent.engine.sdpa import attend_history, attend_passing
from sfi_agent.engine.sequence import LayerState, SequenceState
from sfi_agent.engine.streamed_refresh import LayerWatch, PassSelections
from sfi_agent.errors import ModelInUseError, explain
from sfi_agent.protocols import Selector

__all__ = [
    "ATTENTION_NAME",
    "BatchContext",
    "StepContext",
    "register_attention",
    "slow_fast_attention",
    "streamed_histories",
]

ATTENTION_NAME = "sfi_agent"


@dataclass(slots=True)
class StepContext:
    """One forward pass over one sequence.

    Attributes:
        kind: "dense" appends to every history and attends to all of it (prefill, slow steps,
            mode dense); "fast" attends to the memory on sparse layers.
        sequence: Whose keys and values are read and written.
        capture_rows: How many of the newest post-RoPE queries each sparse layer keeps as evidence.
        measure_mass: Whether fast steps measure their attention mass on the selected tokens.
        selected_mass: One `[]` float32 tensor per sparse layer, when measured.
        on_fast_attention: Told about every sparse layer of a fast step; None costs nothing.
        check_numbers: Whether outputs that are not finite raise, for debugging; the host then waits
            for every layer.
        stream: Brings histories from host memory; needed where the sequence has some there.
        selections: Made while the step runs; None where they are made later, or not at all.
    """

    kind: Literal["dense", "fast"]
    sequence: SequenceState
    capture_rows: int = 0
    measure_mass: bool = False
    selected_mass: list[Tensor] = field(default_factory=list)
    on_fast_attention: Callable[[FastAttention], None] | None = None
    check_numbers: bool = False
    stream: HistoryStream | None = None
    selections: PassSelections | None = None

    def select_within(self, selector: Selector, new_tokens: int) -> None:
        """Let the selections of the refresh behind this step be made while it runs, where its
        history is streamed: evidence then needs no second look at it."""
        if self.sequence.layout is not None and self.sequence.streamed:
            self.selections = PassSelections(self.sequence, selector, new_tokens)


@dataclass(slots=True)
class BatchContext:
    """One forward pass over one token of each of several sequences.

    Attributes:
        rows: The step of each row of the batch.
    """

    rows: list[StepContext]


def streamed_histories(context: StepContext | BatchContext) -> list[LayerHistory]:
    """Histories that a pass reads from host memory, in the order in which its layers ask."""
    steps = context.rows if isinstance(context, BatchContext) else [context]
    by_layer = zip(*(step.sequence.layers for step in steps), strict=True)
    return [
        layer.history
        for layers in by_layer
        for step, layer in zip(steps, layers, strict=True)
        if layer.history.streamed and (step.kind == "dense" or layer.memory is None)
    ]


def register_attention() -> None:
    """Make the function known to transformers under our name; switches nothing on."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, slow_fast_attention)


def slow_fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    sfi: StepContext | BatchContext | ProgramContext | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in one step; the interface of transformers' attention functions.

    Args:
        module: The attention layer; its `layer_idx` picks the layer's state.
        query: `[batch, query_heads, rows, key_dim]`, post-RoPE; batch is 1 unless the step says
            otherwise.
        key: `[batch, kv_heads, rows, key_dim]`, the new tokens only, post-RoPE.
        value: `[batch, kv_heads, rows, value_dim]`.
        attention_mask: Refused: causality and bands are built here.
        scaling: Factor of the logits; `key_dim ** -0.5` if the model passes none.
        softcap: See `AttentionRule`; None and 0 are none.
        s_aux: The sinks of `AttentionRule`, as transformers calls them.
        sliding_window: Checked against what was found when the engine was made.
        sfi: The step; absent when somebody else calls the model.
        keywords: Refused by name when they would change the result.

    Returns:
        `[batch, rows, query_heads, value_dim]` and None for the weights.

    Raises:
        ModelInUseError: `sfi` is missing.
        UnsupportedModelError: An attention keyword, mask or window is not supported.
        NumericsError: An output is not finite, where the step asks for the check.
    """
    if sfi is None:
        raise _called_directly()
    refuse_keywords(keywords)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(sfi, ProgramContext):
        return attend_in_program(module, query, key, value, scale, softcap or 0.0, s_aux), None
    rule = AttentionRule(scale, softcap or 0.0, s_aux)
    index = int(module.layer_idx)  # type: ignore[arg-type]
    steps = sfi.rows if isinstance(sfi, BatchContext) else [sfi]
    window = steps[0].sequence.layers[index].window
    refuse_other_views(module, attention_mask, sliding_window, window, keywords)
    outs = [
        _attend_row(step, index, query[row], key[row], value[row], rule)
        for row, step in enumerate(steps)
    ]
    out = outs[0][None] if len(outs) == 1 else torch.stack(outs)
    # Some families take a view of what transformers' own attention returns contiguous.
    return out.transpose(1, 2).contiguous(), None


def _called_directly() -> ModelInUseError:
    return ModelInUseError(
        explain(
            "called the model directly while slow-fast sessions are open on it",
            remedy="close the sessions first, or decode with session.decode(); closing the last "
            "session restores the model's own attention",
        )
    )


def _attend_row(
    step: StepContext,
    index: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: AttentionRule,
) -> Tensor:
    """One sequence's part: query `[query_heads, rows, key_dim]` to the same with values."""
    layer = step.sequence.layers[index]
    layer.rule = rule
    if step.kind == "fast" and layer.memory is not None:
        layer.memory.append(keys, values)
        out = layer.memory.attend(query, rule)
        if step.measure_mass:
            step.selected_mass.append(layer.memory.selected_mass(query, rule))
        if step.on_fast_attention is not None:
            position = step.sequence.processed_tokens
            step.on_fast_attention(FastAttention(index, position, query, out, layer))
    else:
        out = _attend_dense(step, index, query, keys, values)
    if step.check_numbers:
        new = {"query": query, "keys": keys, "values": values}
        check_finite(step.kind, index, step.sequence.processed_tokens, out, new)
    return out


def _attend_dense(
    step: StepContext, index: int, query: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Append to the history of a layer and attend to all of it."""
    layer, watch = step.sequence.layers[index], None
    own = Piece(layer.history.tokens, keys, values)
    layer.history.append(keys, values)
    if step.capture_rows and layer.memory is not None:
        layer.captured_query = query[:, -step.capture_rows :].clone()
        if step.selections is not None and step.selections.asks(layer):
            watch = step.selections.watch(layer)
    out = _attend_all(step, layer, query, own, watch)
    if watch is not None and step.selections is not None:
        step.selections.choose(index, watch)
    return out


def _attend_all(
    step: StepContext, layer: LayerState, query: Tensor, own: Piece, watch: LayerWatch | None
) -> Tensor:
    if layer.window is not None:
        return _attend_band(query, layer, layer.window)
    if layer.history.streamed:
        assert step.stream is not None, "nobody brings what is in host memory"
        past = step.stream.pieces(layer.history, own.start)
        look = watch.see if watch is not None else None
        return attend_passing(query, past, own, layer.rule, look)
    pieces = list(layer.history.pieces())
    if watch is not None:
        # A layer on the device, beside others that are not.
        for piece in pieces:
            watch.see(piece)
    return attend_history(query, pieces, layer.rule, compiled_rows=bool(step.capture_rows))


def _attend_band(query: Tensor, layer: LayerState, window: int) -> Tensor:
    """Sliding-window attention: each row sees itself and the `window - 1` tokens before it."""
    rows, tokens = query.shape[1], layer.history.tokens
    start = max(0, tokens - rows - window + 1)
    band = layer.history.joined(start, tokens)
    kv_heads = band.keys.shape[0]
    folded = query.reshape(kv_heads, -1, query.shape[-1])
    mask = None
    if rows > 1:
        row = torch.arange(tokens - rows, tokens, device=query.device)[:, None]
        column = torch.arange(start, tokens, device=query.device)[None]
        visible = (column <= row) & (column > row - window)
        mask = visible.repeat(folded.shape[1] // rows, 1)
    if not layer.rule.plain:
        out, lse = tiled_attention(folded, band.keys, band.values, layer.rule, visible=mask)
        shape = query.shape[0], rows
        return layer.rule.share(out.reshape(*shape, -1), lse.reshape(shape))
    out = F.scaled_dot_product_attention(
        folded[None], band.keys[None], band.values[None], attn_mask=mask, scale=layer.rule.scale
    )
    return out.reshape(query.shape[0], rows, -1)
