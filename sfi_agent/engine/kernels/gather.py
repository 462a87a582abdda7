"""Filling memories from histories: one launch for all layers and sequences of a refresh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfi_agent.engine.kernels.availability import uses_kernels
from sfi_agent.engine.kernels.masks import active_rows, mask_bytes
from sfi_agent.engine.kernels.reference import reference_gather
from sfi_agent.engine.kernels.tables import ExtentTable

__all__ = ["gather"]

_SLOTS = 32
"""Memory slots per program."""


def gather(
    history: ExtentTable,
    memory: ExtentTable,
    positions: Tensor,
    counts: Tensor,
    tokens: Tensor,
    starts: Tensor,
    active: Tensor | None = None,
    *,
    selected_capacity: int,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """Copy selected (right-aligned), sink and recent tokens of every layer into the memories.

    Args:
        history: Where the tokens lie.
        memory: One extent per layer and sequence, its first position 0.
        positions: `[layers, batch, kv_heads, budget]` int64, the first `counts` of each head valid.
        counts: `[layers, batch, kv_heads]` int64, at most `selected_capacity`.
        tokens: `[batch]` int64 on the device, the length of each history.
        starts: `[layers, batch, kv_heads]` int64, set to the first visible slot of each head.
        active: `[layers, batch]` bool or int64 on the device; where it is 0 the memory and its
            `starts` are left alone and nothing is read, tables included. None fills every memory.
        selected_capacity: Slots of the selected part, the same for all.
        sink_tokens: First tokens that are always visible.
        recent_tokens: Last tokens that are always visible.
    """
    place = history.any_place
    if not uses_kernels(positions.device, place.keys.dtype, *_dims(history)):
        lengths = tokens.tolist()
        for layer, sequence in active_rows(active, *positions.shape[:2]):
            reference_gather(
                history.layer(layer).places[sequence],
                memory.layer(layer).places[sequence][0],
                positions[layer, sequence],
                counts[layer, sequence],
                lengths[sequence],
                selected_capacity,
                sink_tokens,
                recent_tokens,
            )
            starts[layer, sequence] = selected_capacity - counts[layer, sequence]
        return
    torch.ops.sfi_agent.gather(
        place.keys,
        history.fields,
        memory.fields,
        positions,
        counts,
        tokens,
        starts,
        selected_capacity,
        sink_tokens,
        recent_tokens,
        *_dims(history),
        active,
    )


def _dims(table: ExtentTable) -> tuple[int, int]:
    place = table.any_place
    return place.keys.shape[-1], place.values.shape[-1]


def _gather_op(
    like: Tensor,
    history: Tensor,
    memory: Tensor,
    positions: Tensor,
    counts: Tensor,
    tokens: Tensor,
    starts: Tensor,
    selected_capacity: int,
    sink_tokens: int,
    recent_tokens: int,
    key_dim: int,
    value_dim: int,
    active: Tensor | None = None,
) -> None:
    from sfi_agent.engine.kernels.gather_kernel import gather_kernel

    layers, batch, kv_heads, budget = positions.shape
    assert memory.shape == (layers, batch, 2, history.shape[-1]), "memories are one extent each"
    assert positions.is_contiguous() and counts.is_contiguous() and starts.is_contiguous()
    slots = selected_capacity + sink_tokens + recent_tokens
    gather_kernel[(-(-slots // _SLOTS), layers * batch * kv_heads)](
        like, history, memory, positions, counts, tokens, starts,
        mask_bytes(active, (layers, batch), tokens), budget, batch, kv_heads, selected_capacity,
        sink_tokens, recent_tokens,
        KEY_DIM=key_dim, KEY_BLOCK=1 << (key_dim - 1).bit_length(),
        VALUE_DIM=value_dim, VALUE_BLOCK=1 << (value_dim - 1).bit_length(),
        EXTENTS=history.shape[2] - 1, SLOTS=_SLOTS, MASKED=active is not None, num_warps=4,
    )  # fmt: skip


_operation: Any = torch.library.custom_op(
    "sfi_agent::gather",
    _gather_op,
    mutates_args=("starts",),
    schema="(Tensor like, Tensor history, Tensor memory, Tensor positions, Tensor counts, "
    "Tensor tokens, Tensor(a!) starts, int selected_capacity, int sink_tokens, int recent_tokens, "
    "int key_dim, int value_dim, Tensor? active=None) -> ()",
)


@_operation.register_fake  # type: ignore[untyped-decorator]
def _gather_fake(*_: Any) -> None:
    return None
