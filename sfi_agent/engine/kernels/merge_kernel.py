# mypy: ignore-errors
"""Triton source of what ends an attention program: partial results, their merge, the outputs.

Merging happens in the program that finishes last, in the order of the splits whichever program that
is, so results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish", "store_rows"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _merge(
    partial, partial_lse, partial_rest, base, SPLITS: tl.constexpr, SPLITS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of one block of rows: outputs, log-sum-exps in bits, rest share."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, VALUE_BLOCK)
    every = tl.arange(0, SPLITS_BLOCK)
    place = base + every[:, None] * ROWS + row[None, :]
    inside = (every < SPLITS)[:, None] & (row < ROWS)[None, :]
    lse = tl.load(partial_lse + place, mask=inside, other=float("-inf"))
    peak = tl.max(lse, 0)
    finite_peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - finite_peak[None, :])
    total = tl.sum(weight, 0)
    divisor = tl.where(total > 0.0, total, 1.0)
    rest = tl.sum(weight * tl.load(partial_rest + place, mask=inside, other=0.0), 0) / divisor
    mixed = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    if VALUES:
        for first in range(0, SPLITS, CHUNK):
            split = first + tl.arange(0, CHUNK)
            share = base + split[:, None] * ROWS + row[None, :]
            known = (split < SPLITS)[:, None] & (row < ROWS)[None, :]
            share_lse = tl.load(partial_lse + share, mask=known, other=float("-inf"))
            share_weight = tl.exp2(share_lse - finite_peak[None, :])
            source = partial + share[:, :, None] * VALUE_DIM + column[None, None, :]
            wanted = (split < SPLITS)[:, None, None] & (column < VALUE_DIM)[None, None, :]
            tile = tl.load(source, mask=wanted, other=0.0)
            mixed += tl.sum(share_weight[:, :, None] * tile, 0)
    return mixed / divisor[:, None], peak + tl.log2(total), rest


@triton.jit
def store_rows(
    out, lse, rest_mass, mixed, lse_bits, rest, rows, pair, QUERIES: tl.constexpr,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EVIDENCE_QUERIES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Final results: outputs `[batch, queries, query_heads, value_dim]`, log-sum-exps in nats."""
    valid = rows < QUERIES * GROUP
    sequence = pair // KV_HEADS
    query_head = (pair % KV_HEADS) * GROUP + rows % GROUP
    if VALUES:
        column = tl.arange(0, VALUE_BLOCK)
        target = (sequence * QUERIES + rows // GROUP) * KV_HEADS * GROUP + query_head
        target = out + target[:, None] * VALUE_DIM + column[None, :]
        mask = valid[:, None] & (column < VALUE_DIM)[None, :]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=mask)
    place = (sequence * KV_HEADS * GROUP + query_head) * QUERIES + rows // GROUP
    tl.store(lse + place, lse_bits / LOG2_E, mask=valid)
    if EVIDENCE_QUERIES > 0:
        row = rows - (QUERIES - EVIDENCE_QUERIES) * GROUP
        place = pair * EVIDENCE_QUERIES * GROUP + row
        tl.store(rest_mass + place, rest, mask=valid & (row >= 0))


@triton.jit
def finish(
    out, lse, rest_mass, partial, partial_lse, partial_rest, counters, peak, total, rest, mixed,
    block, split, pair, QUERIES: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    KEPT_ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr, MERGE_CHUNK: tl.constexpr, EVIDENCE_QUERIES: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Write the results, or a share of them; the last program of a block of rows merges shares."""
    # A range without visible tokens has total 0 and log-sum-exp -inf: no weight in the merge.
    divisor = tl.where(total > 0.0, total, 1.0)
    mixed = mixed / divisor[:, None]
    rest = rest / divisor
    lse_bits = peak + tl.log2(total)
    local = tl.arange(0, BLOCK_ROWS)
    if SPLITS == 1:
        store_rows(
            out, lse, rest_mass, mixed, lse_bits, rest, block * BLOCK_ROWS + local, pair, QUERIES,
            GROUP, KV_HEADS, VALUE_DIM, VALUE_BLOCK, EVIDENCE_QUERIES, VALUES,
        )  # fmt: skip
    else:
        slot = pair * ROW_BLOCKS + block
        place = (slot * SPLITS + split) * KEPT_ROWS + local
        kept = local < KEPT_ROWS
        if VALUES:
            column = tl.arange(0, VALUE_BLOCK)
            target = partial + place[:, None] * VALUE_DIM + column[None, :]
            tl.store(target, mixed, mask=kept[:, None] & (column < VALUE_DIM)[None, :])
        tl.store(partial_lse + place, lse_bits, mask=kept)
        tl.store(partial_rest + place, rest, mask=kept)
        # The barrier orders the stores of all threads before this program's count, and the atomic
        # orders the counts of all programs before the loads of the one that sees the last of them.
        tl.debug_barrier()
        finished = tl.atomic_add(counters + slot, 1, sem="acq_rel", scope="gpu")
        if finished == SPLITS - 1:
            merged, merged_lse, merged_rest = _merge(
                partial, partial_lse, partial_rest, slot * SPLITS * KEPT_ROWS, SPLITS,
                SPLITS_BLOCK, KEPT_ROWS, VALUE_DIM, VALUE_BLOCK, MERGE_CHUNK, VALUES,
            )  # fmt: skip
            rows = block * BLOCK_ROWS + tl.arange(0, KEPT_ROWS)
            store_rows(
                out, lse, rest_mass, merged, merged_lse, merged_rest, rows, pair, QUERIES, GROUP,
                KV_HEADS, VALUE_DIM, VALUE_BLOCK, EVIDENCE_QUERIES, VALUES,
            )  # fmt: skip
            # Ready for the next launch, a replayed one as well.
            tl.store(counters + slot, 0)
