# mypy: ignore-errors
"""Triton source of the gather that fills memories. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from sfi_agent.engine.kernels.copy_kernel import copy_rows, head_pointers
from sfi_agent.engine.kernels.tile_kernel import TABLE_FIELDS

__all__ = ["gather_kernel"]


@triton.jit
def _source_positions(
    positions, count, place, capacity, sink_tokens, recent_start, total, SENTINEL: tl.constexpr
):  # fmt: skip
    """Which position each memory slot holds; `SENTINEL` where it holds none."""
    selected = place - (capacity - count)
    is_selected = (place < capacity) & (selected >= 0)
    chosen = tl.load(positions + selected, mask=is_selected, other=0).to(tl.int32)
    behind = place - capacity
    is_sink = (behind >= 0) & (behind < sink_tokens)
    recent = recent_start + behind - sink_tokens
    is_recent = (behind >= sink_tokens) & (recent < total)
    source = tl.where(is_selected, chosen, SENTINEL)
    source = tl.where(is_sink, behind, source)
    return tl.where(is_recent, recent, source)


# Rows of larger tensors may begin anywhere; one compiled kernel serves them all.
@triton.jit(do_not_specialize_on_alignment=["tokens", "active"])
def gather_kernel(
    like, history, memory, positions, counts, tokens, starts, active, budget, sequences, kv_heads,
    capacity, sink_tokens, recent_tokens,
    KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EXTENTS: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """See `gather.gather`. Grid: (blocks of slots, layers x batch x KV heads)."""
    block, pair = tl.program_id(0), tl.program_id(1)
    row, head = pair // kv_heads, pair % kv_heads
    if MASKED:
        if tl.load(active + row) == 0:
            return
    total = tl.load(tokens + row % sequences).to(tl.int32)
    sink = tl.minimum(sink_tokens, total)
    recent_start = tl.maximum(sink, total - recent_tokens)
    count = tl.load(counts + pair).to(tl.int32)
    if block == 0:
        tl.store(starts + pair, (capacity - count).to(tl.int64))
    place = block * SLOTS + tl.arange(0, SLOTS)
    SENTINEL: tl.constexpr = 2**30
    source = _source_positions(
        positions + pair.to(tl.int64) * budget, count, place, capacity, sink, recent_start, total,
        SENTINEL,
    )  # fmt: skip
    to_keys, to_values = head_pointers(memory + row * 2 * TABLE_FIELDS, head, like.dtype)
    for extent in range(EXTENTS):
        field = history + (row * (EXTENTS + 1) + extent) * TABLE_FIELDS
        first = tl.load(field + 4).to(tl.int32)
        stop = tl.load(field + 4 + TABLE_FIELDS).to(tl.int32)
        wanted = (source >= first) & (source < stop) & (source < total)
        keys, values = head_pointers(field, head, like.dtype)
        copy_rows(keys, to_keys, source - first, place, wanted, KEY_DIM, KEY_BLOCK)
        copy_rows(values, to_values, source - first, place, wanted, VALUE_DIM, VALUE_BLOCK)
