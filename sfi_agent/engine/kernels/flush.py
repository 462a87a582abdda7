"""Fast tokens from memories to histories: one launch for all layers and sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfi_agent.engine.kernels.availability import uses_kernels
from sfi_agent.engine.kernels.masks import active_rows, mask_bytes
from sfi_agent.engine.kernels.reference import reference_flush
from sfi_agent.engine.kernels.tables import ExtentTable

__all__ = ["flush"]

_TOKENS = 32
"""Tokens per program."""


def flush(
    memory: ExtentTable,
    history: ExtentTable,
    segment_starts: Tensor,
    segment_tokens: Tensor,
    history_tokens: Tensor,
    active: Tensor | None = None,
    *,
    most_tokens: int,
) -> None:
    """Append the open segment of every layer and sequence to its history.

    Keys and values of memory slots `[start, start + tokens)` go to history positions `[history,
    history + tokens)`; the history extent that holds position `history` has room for all of them.

    Args:
        memory: One extent per layer and sequence, its first position 0.
        history: Where the tokens go.
        segment_starts: `[batch]` int64 on the device, the first slot of each segment.
        segment_tokens: `[batch]` int64 on the device, 0 where nothing is to be copied.
        history_tokens: `[batch]` int64 on the device, the length of each history so far.
        active: `[layers, batch]` bool or int64 on the device; where it is 0 nothing is read or
            written. None copies everywhere.
        most_tokens: How many tokens a segment is expected to have at most. It sizes the launch;
            longer segments are copied as well, by fewer programs.
    """
    place = history.any_place
    dims = place.keys.shape[-1], place.values.shape[-1]
    if not uses_kernels(segment_tokens.device, place.keys.dtype, *dims):
        bounds = [numbers.tolist() for numbers in (segment_starts, segment_tokens, history_tokens)]
        for layer, sequence in active_rows(active, *history.fields.shape[:2]):
            source = memory.layer(layer).places[sequence][0]
            target = history.layer(layer).places[sequence]
            reference_flush(source, target, *(numbers[sequence] for numbers in bounds))
        return
    torch.ops.sfi_agent.flush(
        place.keys,
        memory.fields,
        history.fields,
        segment_starts,
        segment_tokens,
        history_tokens,
        active,
        most_tokens,
        place.keys.shape[0],
        *dims,
    )


def _flush_op(
    like: Tensor,
    memory: Tensor,
    history: Tensor,
    segment_starts: Tensor,
    segment_tokens: Tensor,
    history_tokens: Tensor,
    active: Tensor | None,
    most_tokens: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    from sfi_agent.engine.kernels.flush_kernel import flush_kernel

    layers, batch = history.shape[:2]
    assert memory.shape == (layers, batch, 2, history.shape[-1]), "memories are one extent each"
    for numbers in (segment_starts, segment_tokens, history_tokens):
        assert numbers.shape == (batch,) and numbers.is_contiguous()
    blocks = max(1, -(-most_tokens // _TOKENS))
    flush_kernel[(blocks, layers * batch * kv_heads)](
        like, memory, history, segment_starts, segment_tokens, history_tokens,
        mask_bytes(active, (layers, batch), segment_tokens), batch, kv_heads,
        KEY_DIM=key_dim, KEY_BLOCK=1 << (key_dim - 1).bit_length(),
        VALUE_DIM=value_dim, VALUE_BLOCK=1 << (value_dim - 1).bit_length(),
        EXTENTS=history.shape[2] - 1, TOKENS=_TOKENS, MASKED=active is not None, num_warps=4,
    )  # fmt: skip


# What is written lies behind the addresses in the table: the table stands for it, so that a
# compiler neither drops nor moves a launch without results.
_operation: Any = torch.library.custom_op(
    "sfi_agent::flush",
    _flush_op,
    mutates_args=("history",),
    schema="(Tensor like, Tensor memory, Tensor(a!) history, Tensor segment_starts, "
    "Tensor segment_tokens, Tensor history_tokens, Tensor? active, int most_tokens, int kv_heads, "
    "int key_dim, int value_dim) -> ()",
)


@_operation.register_fake  # type: ignore[untyped-decorator]
def _flush_fake(*_: Any) -> None:
    return None
