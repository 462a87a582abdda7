# mypy: ignore-errors
"""Triton source of the flush of segments. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from sfi_agent.engine.kernels.copy_kernel import copy_rows, head_pointers
from sfi_agent.engine.kernels.tile_kernel import TABLE_FIELDS

__all__ = ["flush_kernel"]


# Rows of larger tensors may begin anywhere; one compiled kernel serves them all.
@triton.jit(
    do_not_specialize_on_alignment=["segment_starts", "segment_tokens", "history_tokens", "active"]
)
def flush_kernel(
    like, memory, history, segment_starts, segment_tokens, history_tokens, active, sequences,
    kv_heads,
    KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EXTENTS: tl.constexpr, TOKENS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """See `flush.flush`. Grid: (blocks of tokens, layers x batch x KV heads)."""
    block, pair = tl.program_id(0), tl.program_id(1)
    row, head = pair // kv_heads, pair % kv_heads
    if MASKED:
        if tl.load(active + row) == 0:
            return
    sequence = row % sequences
    tokens = tl.load(segment_tokens + sequence).to(tl.int32)
    slot = tl.load(segment_starts + sequence).to(tl.int32)
    end = tl.load(history_tokens + sequence).to(tl.int32)
    stride = tl.num_programs(0) * TOKENS
    from_keys, from_values = head_pointers(memory + row * 2 * TABLE_FIELDS, head, like.dtype)
    for extent in range(EXTENTS):
        field = history + (row * (EXTENTS + 1) + extent) * TABLE_FIELDS
        first = tl.load(field + 4).to(tl.int32)
        stop = tl.load(field + 4 + TABLE_FIELDS).to(tl.int32)
        # The extent that holds the next position, and no other, takes the tokens.
        if first <= end and end < stop:
            keys, values = head_pointers(field, head, like.dtype)
            for offset in range(block * TOKENS, tokens, stride):
                place = offset + tl.arange(0, TOKENS)
                target = end - first + place
                wanted = place < tokens
                copy_rows(from_keys, keys, slot + place, target, wanted, KEY_DIM, KEY_BLOCK)
                copy_rows(from_values, values, slot + place, target, wanted, VALUE_DIM, VALUE_BLOCK)
