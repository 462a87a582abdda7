# mypy: ignore-errors
"""Triton source of the attention kernel. Importing this module imports Triton.

One program reads one range of one KV head's tokens for up to `BLOCK_ROWS` query rows (new tokens x
query heads of the group) and keeps a running softmax. The program that finishes last for a block of
rows merges the partial results, so that a step is one launch. Ranges are cut from lengths that live
on the device: the grid depends on capacities alone and can be captured.

Triton's language is untyped; `attention.py` holds the typed interface.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sfi_agent.engine.kernels.merge_kernel import finish
from sfi_agent.engine.kernels.tile_kernel import (
    LOG2_E,
    TABLE_FIELDS,
    absorb,
    extent_pointers,
    scaled_logits,
    store_evidence,
)

__all__ = ["attend_kernel"]

SPLIT_ALIGNMENT = tl.constexpr(16)


@triton.jit
def _scan_extent(
    query, evidence_query, keys, values, evidence, evidence_row, row_position, low, high,
    first_candidate, last_candidate, peak, total, mixed, scale, softcap, window, evidence_stride,
    BLOCK_TOKENS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
    BAND: tl.constexpr, EVIDENCE: tl.constexpr, EVIDENCE_BLOCK: tl.constexpr, LAZY: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Tokens `[low, high)`, all earlier than the step's own."""
    token = tl.arange(0, BLOCK_TOKENS)
    depth = tl.arange(0, KEY_BLOCK)
    column = tl.arange(0, VALUE_BLOCK)
    for offset in range(low, high, BLOCK_TOKENS):
        position = offset + token
        known = position < high
        mask = known[None, :]
        if KEY_BLOCK != KEY_DIM:
            mask = mask & (depth < KEY_DIM)[:, None]
        source = keys + offset * KEY_DIM + (token[None, :] * KEY_DIM + depth[:, None])
        tile = tl.load(source, mask=mask, other=0.0)
        logits = scaled_logits(query, tile, scale, softcap, SOFTCAP)
        if EVIDENCE:
            asked = logits
            if EVIDENCE_BLOCK > 0:
                asked = scaled_logits(evidence_query, tile, scale, softcap, SOFTCAP)
            store_evidence(
                evidence, asked, evidence_row, position, first_candidate,
                tl.minimum(last_candidate, high), evidence_stride,
            )  # fmt: skip
        visible = known[None, :]
        if BAND:
            visible = visible & (position[None, :] > (row_position - window)[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        if VALUES:
            mask = known[:, None]
            if VALUE_BLOCK != VALUE_DIM:
                mask = mask & (column < VALUE_DIM)[None, :]
            source = values + offset * VALUE_DIM + (token[:, None] * VALUE_DIM + column[None, :])
            tile = tl.load(source, mask=mask, other=0.0)
        peak, total, mixed = absorb(logits, tile, peak, total, mixed, LAZY, VALUES)
    return peak, total, mixed


@triton.jit
def _append_new_tokens(
    keys, values, table, head, place, key_mask, value_mask, end, POINTER: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EXTENTS: tl.constexpr,
):  # fmt: skip
    """Write the step's keys and values behind the earlier tokens."""
    depth = tl.arange(0, KEY_BLOCK)
    column = tl.arange(0, VALUE_BLOCK)
    for extent in range(EXTENTS):
        to_keys, to_values, first, stop = extent_pointers(
            table, extent, head, POINTER, KEY_DIM, VALUE_DIM
        )
        # The extent that holds the next position, and no other, takes the new tokens.
        if first <= end and end < stop:
            tl.store(to_keys + place[None, :] * KEY_DIM + depth[:, None], keys, mask=key_mask)
            target = to_values + place[:, None] * VALUE_DIM + column[None, :]
            tl.store(target, values, mask=value_mask)


@triton.jit
def _attend_new_tokens(
    query, evidence_query, new_keys, new_values, table, evidence, evidence_row, query_index, head,
    sequence, block, end, first_candidate, last_candidate, peak, total, rest, mixed, scale,
    softcap, window, evidence_stride, QUERIES: tl.constexpr, NEW_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, EXTENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, APPEND: tl.constexpr,
    EVIDENCE_QUERIES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The step's own tokens, causal among themselves; the first block of rows also appends them."""
    token = tl.arange(0, NEW_BLOCK)
    depth = tl.arange(0, KEY_BLOCK)
    column = tl.arange(0, VALUE_BLOCK)
    known = token < QUERIES
    position = end + token
    key_mask = known[None, :] & (depth < KEY_DIM)[:, None]
    value_mask = known[:, None] & (column < VALUE_DIM)[None, :]
    row = (sequence * QUERIES + token) * KV_HEADS + head
    keys = tl.load(new_keys + row[None, :] * KEY_DIM + depth[:, None], key_mask, other=0.0)
    source = new_values + row[:, None] * VALUE_DIM + column[None, :]
    values = tl.load(source, value_mask, other=0.0)
    if APPEND:
        if block == 0:
            _append_new_tokens(
                keys, values, table, head, position, key_mask, value_mask, end, new_keys.dtype,
                KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, EXTENTS,
            )  # fmt: skip
    if EVIDENCE_QUERIES > 0:
        asked = scaled_logits(evidence_query, keys, scale, softcap, SOFTCAP)
        index = QUERIES - EVIDENCE_QUERIES + evidence_row // GROUP
        asked = tl.where(token[None, :] <= index[:, None], asked, float("-inf"))
        stop = tl.minimum(last_candidate, end + QUERIES)
        store_evidence(
            evidence, asked, evidence_row, position, first_candidate, stop, evidence_stride
        )
    logits = scaled_logits(query, keys, scale, softcap, SOFTCAP)
    visible = known[None, :] & (token[None, :] <= query_index[:, None])
    if WINDOW:
        visible = visible & (token[None, :] > query_index[:, None] - window)
    logits = tl.where(visible, logits, float("-inf"))
    old_peak = peak
    peak, total, mixed = absorb(logits, values, peak, total, mixed, False, VALUES)
    if EVIDENCE_QUERIES > 0:
        # Every row sees at least its own token, so its peak is finite now.
        is_rest = (position < first_candidate) | (position >= last_candidate)
        weights = tl.exp2(
            tl.where(is_rest[None, :], logits, float("-inf")) * LOG2_E - peak[:, None]
        )
        rest = rest * tl.exp2(old_peak - peak) + tl.sum(weights, 1)
    return peak, total, rest, mixed


@triton.jit
def _load_rows(
    query, rows, valid, sequence, head, QUERIES: tl.constexpr, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries `[rows, key_dim]` of one KV head; rows are queries x heads of the group."""
    depth = tl.arange(0, KEY_BLOCK)
    row = ((sequence * QUERIES + rows // GROUP) * KV_HEADS + head) * GROUP + rows % GROUP
    mask = valid[:, None] & (depth < KEY_DIM)[None, :]
    return tl.load(query + row[:, None] * KEY_DIM + depth[None, :], mask=mask, other=0.0)


@triton.jit
def _evidence_rows(
    query, queries, block, sequence, head, QUERIES: tl.constexpr, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
    EVIDENCE_QUERIES: tl.constexpr, EVIDENCE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The asked queries and their rows in the evidence, below 0 where nothing is stored.

    They are the program's own rows where all of them are asked (`EVIDENCE_BLOCK` is 0); else the
    first block of rows takes them as extra rows, because masked stores of a large tile cost more
    than a small product.
    """
    if EVIDENCE_BLOCK == 0:
        row = tl.arange(0, queries.shape[0])
        return queries, tl.where(row < EVIDENCE_QUERIES * GROUP, row, -1)
    else:
        row = tl.arange(0, EVIDENCE_BLOCK)
        stored = row + block * EVIDENCE_BLOCK < EVIDENCE_QUERIES * GROUP
        asked = _load_rows(
            query, (QUERIES - EVIDENCE_QUERIES) * GROUP + row, stored, sequence, head, QUERIES,
            GROUP, KV_HEADS, KEY_DIM, KEY_BLOCK,
        )  # fmt: skip
        return asked, tl.where(stored, row, -1)


@triton.jit
def _scan_history(
    query, evidence_query, table, evidence, evidence_row, row_position, head, low, high,
    first_candidate, last_candidate, scale, softcap, window, evidence_stride,
    BLOCK_ROWS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    EXTENTS: tl.constexpr, SOFTCAP: tl.constexpr, BAND: tl.constexpr, EVIDENCE: tl.constexpr,
    EVIDENCE_BLOCK: tl.constexpr, VALUES: tl.constexpr, POINTER: tl.constexpr,
):  # fmt: skip
    """Tokens `[low, high)`: with evidence, sink and recent ones first, whose total is the rest."""
    LAZY: tl.constexpr = BLOCK_ROWS == 16
    PARTS: tl.constexpr = 3 if EVIDENCE else 1
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    rest = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, VALUE_BLOCK], tl.float32)
    if LAZY:
        total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    else:
        total = tl.zeros([BLOCK_ROWS], tl.float32)
    for part in range(PARTS):
        part_low, part_high = low, high
        if EVIDENCE:
            if part == 0:
                part_high = tl.minimum(high, first_candidate)
            elif part == 1:
                part_low = tl.maximum(low, last_candidate)
            else:
                part_low = tl.maximum(low, first_candidate)
                part_high = tl.minimum(high, last_candidate)
        old_peak = peak
        for extent in range(EXTENTS):
            keys, values, first, stop = extent_pointers(
                table, extent, head, POINTER, KEY_DIM, VALUE_DIM
            )
            peak, total, mixed = _scan_extent(
                query, evidence_query, keys, values, evidence, evidence_row, row_position,
                tl.maximum(part_low, first), tl.minimum(part_high, stop), first_candidate,
                last_candidate, peak, total, mixed, scale, softcap, window, evidence_stride,
                BLOCK_TOKENS, KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, SOFTCAP, BAND, EVIDENCE,
                EVIDENCE_BLOCK, LAZY, VALUES,
            )  # fmt: skip
        if EVIDENCE:
            if part < 2:
                rest = tl.sum(total, 1) if LAZY else total
            else:
                finite_peak = tl.where(peak == float("-inf"), 0.0, peak)
                rest = rest * tl.exp2(old_peak - finite_peak)
    return peak, tl.sum(total, 1) if LAZY else total, rest, mixed


@triton.jit
def attend_kernel(
    query, new_keys, new_values, table, starts, ends, out, lse, partial, partial_lse,
    partial_rest, counters, evidence, rest_mass, scale, softcap, window, sink_tokens,
    recent_tokens, evidence_stride,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, KEPT_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    NEW_BLOCK: tl.constexpr, ROW_BLOCKS: tl.constexpr, EXTENTS: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr, MERGE_CHUNK: tl.constexpr,
    EVIDENCE_QUERIES: tl.constexpr, EVIDENCE_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, NEW_TOKENS: tl.constexpr, APPEND: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """See `attention.attend`. Grid: (row blocks, splits, batch x KV heads)."""
    block, split, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, head = pair // KV_HEADS, pair % KV_HEADS
    table += sequence * (EXTENTS + 1) * TABLE_FIELDS
    end = tl.load(ends + sequence).to(tl.int32)
    start = tl.load(starts + pair).to(tl.int32)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    queries = _load_rows(
        query, rows, rows < QUERIES * GROUP, sequence, head, QUERIES, GROUP, KV_HEADS, KEY_DIM,
        KEY_BLOCK,
    )  # fmt: skip
    asked, asked_row = _evidence_rows(
        query, queries, block, sequence, head, QUERIES, GROUP, KV_HEADS, KEY_DIM, KEY_BLOCK,
        EVIDENCE_QUERIES, EVIDENCE_BLOCK,
    )  # fmt: skip
    evidence += pair.to(tl.int64) * (EVIDENCE_QUERIES * GROUP) * evidence_stride
    tokens = end + QUERIES if NEW_TOKENS else end
    first_candidate = tl.minimum(sink_tokens, tokens)
    last_candidate = tl.maximum(first_candidate, tokens - recent_tokens)
    if WINDOW:
        start = tl.maximum(start, end - window + 1)
    share = tl.cdiv(tl.maximum(end - start, 0), SPLITS)
    share = tl.cdiv(share, SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT
    low = start + split * share
    peak, total, rest, mixed = _scan_history(
        queries, asked, table, evidence, asked_row, end + rows // GROUP, head, low,
        tl.minimum(low + share, end), first_candidate, last_candidate, scale, softcap, window,
        evidence_stride, BLOCK_ROWS, KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, BLOCK_TOKENS,
        EXTENTS, SOFTCAP, WINDOW and QUERIES > 1, EVIDENCE_QUERIES > 0, EVIDENCE_BLOCK, VALUES,
        query.dtype,
    )  # fmt: skip
    if NEW_TOKENS:
        # Rounding makes the last range the shortest, so the new tokens go there.
        if split == SPLITS - 1:
            peak, total, rest, mixed = _attend_new_tokens(
                queries, asked, new_keys, new_values, table, evidence, asked_row, rows // GROUP,
                head, sequence, block, end, first_candidate, last_candidate, peak, total, rest,
                mixed, scale, softcap, window, evidence_stride, QUERIES, NEW_BLOCK, GROUP, KV_HEADS,
                KEY_DIM, KEY_BLOCK, VALUE_DIM, VALUE_BLOCK, EXTENTS, SOFTCAP, WINDOW, APPEND,
                EVIDENCE_QUERIES, VALUES,
            )  # fmt: skip
    finish(
        out, lse, rest_mass, partial, partial_lse, partial_rest, counters, peak, total, rest, mixed,
        block, split, pair, QUERIES, GROUP, KV_HEADS, VALUE_DIM, VALUE_BLOCK, BLOCK_ROWS, KEPT_ROWS,
        ROW_BLOCKS, SPLITS, SPLITS_BLOCK, MERGE_CHUNK, EVIDENCE_QUERIES, VALUES,
    )  # fmt: skip
