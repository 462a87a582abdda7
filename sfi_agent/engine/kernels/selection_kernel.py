# mypy: ignore-errors
"""Triton source of ranking and selection. Importing this module imports Triton.

Ranking turns evidence into one sortable integer per candidate and notes the largest of every few
neighbours, their peak. Selection then works on one row per program: the budget-th largest peak is a
lower bound of the budget-th largest key, so only neighbours whose peak reaches it are read. That
leaves a short list, on which the exact bound is found bit by bit. Nothing is sorted, and positions
come out ascending.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rank_kernel", "select_kernel"]

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_KEY = tl.constexpr(-(2**31))
HIGHEST_BIT = tl.constexpr(2**31)
KEPT_KEY = tl.constexpr(0x7F800000)
"""The bits of infinity, above all finite masses."""


@triton.jit
def _candidates(tokens, sequence, sink_tokens, recent_tokens):
    count = tl.load(tokens + sequence).to(tl.int32)
    first = tl.minimum(sink_tokens, count)
    return first, tl.maximum(first, count - recent_tokens)


# Rows of larger tensors may begin anywhere; one compiled kernel serves them all.
@triton.jit(do_not_specialize_on_alignment=["lse", "tokens", "kept_first", "kept_stop", "active"])
def rank_kernel(
    logits, lse, tokens, keys, peaks, kept_first, kept_stop, active, sequences, sink_tokens,
    recent_tokens, row_stride, keys_stride, peaks_stride, heads,
    ROWS: tl.constexpr, ROWS_BLOCK: tl.constexpr, TILE: tl.constexpr, PEAK_TOKENS: tl.constexpr,
    KEPT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """See `selection.rank`. Grid: (tiles of the capacity, rows of keys)."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    sequence = (pair // heads) % sequences
    first, last = _candidates(tokens, sequence, sink_tokens, recent_tokens)
    wanted = tile * TILE < last
    if MASKED:
        wanted = wanted & (tl.load(active + pair // heads) != 0)
    if wanted:
        position = tile * TILE + tl.arange(0, TILE)
        row = tl.arange(0, ROWS_BLOCK)
        inside = (position >= first) & (position < last)
        # Masks that are multiples of 16 keep loads and stores wide; what lies outside the
        # candidates is replaced below.
        source = logits + (pair.to(tl.int64) * ROWS + row)[:, None] * row_stride
        mask = (row < ROWS)[:, None] & (position < row_stride)[None, :]
        evidence = tl.load(source + position[None, :], mask=mask, other=float("-inf")).to(
            tl.float32
        )
        normaliser = tl.load(lse + pair * ROWS + row, mask=row < ROWS, other=0.0)
        share = evidence - normaliser[:, None]
        largest = tl.max(share, 0)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.sum(tl.exp2((share - largest[None, :]) * LOG2_E), 0)
        mass = tl.log2(total) / LOG2_E + largest
        # -0.0 would rank below 0.0.
        bits = tl.where(mass == 0.0, 0.0, mass).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        if KEPT:
            is_kept = position >= tl.load(kept_first + sequence)
            is_kept = is_kept & (position < tl.load(kept_stop + sequence))
            key = tl.where(is_kept, KEPT_KEY, key)
        key = tl.where(inside, key, LOWEST_KEY)
        target = keys + pair.to(tl.int64) * keys_stride
        tl.store(target + position, key, mask=position < keys_stride)
        peak = tl.max(tl.reshape(key, [TILE // PEAK_TOKENS, PEAK_TOKENS]), 1)
        place = tile * (TILE // PEAK_TOKENS) + tl.arange(0, TILE // PEAK_TOKENS)
        tl.store(peaks + pair * peaks_stride + place, peak, mask=place * PEAK_TOKENS < last)


@triton.jit
def _unsigned(key):
    """Keys in unsigned order, so that a bound can be built from its highest bit down."""
    return key.to(tl.uint32, bitcast=True) ^ HIGHEST_BIT


@triton.jit
def _peak_bound(
    peaks, first_block, stop_block, count, LOWEST_BIT: tl.constexpr, PEAKS_BLOCK: tl.constexpr
):  # fmt: skip
    """A bound that at least `count` keys reach, because that many peaks do."""
    place = tl.arange(0, PEAKS_BLOCK)
    known = (place >= first_block) & (place < stop_block)
    peak = _unsigned(tl.load(peaks + place, mask=known, other=LOWEST_KEY))
    bound = tl.zeros([], tl.uint32)
    bit = tl.full([], HIGHEST_BIT, tl.uint32)
    for _ in range(32 - LOWEST_BIT):
        trial = bound | bit
        # A place that is not known has an unsigned peak of 0, below every trial.
        reached = tl.sum((peak >= trial).to(tl.int32), 0)
        bound = tl.where(reached >= count, trial, bound)
        bit = bit >> 1
    return bound


@triton.jit
def _promising_blocks(peaks, first_block, stop_block, bound, TILE: tl.constexpr):
    """Replace the peaks by the numbers of the blocks whose peak reaches the bound, ascending."""
    blocks = tl.zeros([], tl.int32)
    for offset in range(first_block, stop_block, TILE):
        place = offset + tl.arange(0, TILE)
        known = place < stop_block
        peak = _unsigned(tl.load(peaks + place, mask=known, other=LOWEST_KEY))
        kept = (known & (peak >= bound)).to(tl.int32)
        target = blocks + tl.cumsum(kept, 0) - kept
        tl.debug_barrier()
        tl.store(peaks + target, place, mask=kept > 0)
        blocks += tl.sum(kept, 0)
    tl.debug_barrier()
    return blocks


@triton.jit
def _block_keys(
    keys, number, slot, blocks, lane, first, last, PEAK_TOKENS: tl.constexpr
):  # fmt: skip
    """Positions of a block's keys and the keys, the lowest key where there is no candidate."""
    position = number * PEAK_TOKENS + lane % PEAK_TOKENS
    inside = (slot < blocks) & (position >= first) & (position < last)
    return position, inside, tl.load(keys + position, mask=inside, other=LOWEST_KEY)


@triton.jit
def _shorten(
    keys, indices, peaks, blocks, first, last, bound, PEAK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Move the keys that reach the bound to the front, in order, and note where they came from.

    A key moves to where all reads are done: the list never outgrows the blocks read so far. Block
    numbers and keys are loaded ahead, since one depends on the other.
    """
    STEP: tl.constexpr = TILE // PEAK_TOKENS
    lane = tl.arange(0, TILE)
    slot = lane // PEAK_TOKENS
    number = tl.load(peaks + slot, mask=slot < blocks, other=0)
    ahead = tl.load(peaks + slot + STEP, mask=slot + STEP < blocks, other=0)
    position, inside, key = _block_keys(keys, number, slot, blocks, lane, first, last, PEAK_TOKENS)
    length = tl.zeros([], tl.int32)
    for offset in range(0, blocks, STEP):
        next_slot = offset + STEP + slot
        next_position, next_inside, next_key = _block_keys(
            keys, ahead, next_slot, blocks, lane, first, last, PEAK_TOKENS
        )
        next_slot += STEP
        ahead = tl.load(peaks + next_slot, mask=next_slot < blocks, other=0)
        kept = inside & (_unsigned(key) >= bound)
        count = kept.to(tl.int32)
        place = length + tl.cumsum(count, 0) - count
        tl.debug_barrier()
        tl.store(keys + place, key, mask=kept)
        tl.store(indices + place, position, mask=kept)
        length += tl.sum(count, 0)
        position, inside, key = next_position, next_inside, next_key
    tl.debug_barrier()
    return length


@triton.jit
def _count_reaching(keys, length, head, head_known, bound, LIST: tl.constexpr):
    """How many keys of the list reach the bound; the first `LIST` of them are in registers."""
    reached = tl.sum(((head >= bound) & head_known).to(tl.int32), 0)
    for offset in range(LIST, length, LIST):
        place = offset + tl.arange(0, LIST)
        key = _unsigned(tl.load(keys + place, mask=place < length, other=LOWEST_KEY))
        reached += tl.sum(((key >= bound) & (place < length)).to(tl.int32), 0)
    return reached


@triton.jit
def _exact_bound(keys, length, count, LIST: tl.constexpr):
    """The `count`-th largest key of the list, and how many keys lie above it."""
    place = tl.arange(0, LIST)
    known = place < length
    head = _unsigned(tl.load(keys + place, mask=known, other=LOWEST_KEY))
    bound = tl.zeros([], tl.uint32)
    bit = tl.full([], HIGHEST_BIT, tl.uint32)
    for _ in range(32):
        trial = bound | bit
        reached = _count_reaching(keys, length, head, known, trial, LIST)
        bound = tl.where(reached >= count, trial, bound)
        bit = bit >> 1
    # No key has all bits set (that would be a NaN), so the next larger bound exists.
    return bound, _count_reaching(keys, length, head, known, bound + 1, LIST)


@triton.jit
def _select_row(
    keys, peaks, indices, positions, first, last, count, PEAK_TOKENS: tl.constexpr,
    PEAKS_BLOCK: tl.constexpr, TILE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Write the positions of the `count` best keys, ascending; how many those are."""
    first_block, stop_block = first // PEAK_TOKENS, tl.cdiv(last, PEAK_TOKENS)
    bound = _peak_bound(peaks, first_block, stop_block, count, 8, PEAKS_BLOCK)
    blocks = _promising_blocks(peaks, first_block, stop_block, bound, TILE)
    length = _shorten(keys, indices, peaks, blocks, first, last, bound, PEAK_TOKENS, TILE)
    bound, above = _exact_bound(keys, length, count, LIST)
    placed = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for offset in range(0, length, LIST):
        place = offset + tl.arange(0, LIST)
        known = place < length
        key = _unsigned(tl.load(keys + place, mask=known, other=LOWEST_KEY))
        equal = ((key == bound) & known).to(tl.int32)
        # Of equal keys the lower positions come first.
        rank = ties + tl.cumsum(equal, 0)
        chosen = known & ((key > bound) | ((equal > 0) & (rank <= count - above)))
        number = chosen.to(tl.int32)
        target = placed + tl.cumsum(number, 0) - number
        index = tl.load(indices + place, mask=chosen, other=0)
        tl.store(positions + target, index.to(tl.int64), mask=chosen)
        placed += tl.sum(number, 0)
        ties += tl.sum(equal, 0)
    return placed


# Rows of larger tensors may begin anywhere; one compiled kernel serves them all.
@triton.jit(do_not_specialize_on_alignment=["tokens", "active"])
def select_kernel(
    keys, peaks, tokens, indices, positions, counts, active, budget, sequences, heads, sink_tokens,
    recent_tokens, keys_stride, peaks_stride,
    PEAK_TOKENS: tl.constexpr, PEAKS_BLOCK: tl.constexpr, TILE: tl.constexpr, LIST: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """See `selection.select`. Grid: rows of keys."""
    pair = tl.program_id(0)
    if MASKED:
        if tl.load(active + pair // heads) == 0:
            return
    first, last = _candidates(tokens, (pair // heads) % sequences, sink_tokens, recent_tokens)
    count = tl.minimum(budget, last - first)
    keys += pair.to(tl.int64) * keys_stride
    indices += pair.to(tl.int64) * keys_stride
    positions += pair.to(tl.int64) * budget
    peaks += pair.to(tl.int64) * peaks_stride
    placed = tl.zeros([], tl.int32)
    if count > 0:
        placed = _select_row(
            keys, peaks, indices, positions, first, last, count, PEAK_TOKENS, PEAKS_BLOCK, TILE,
            LIST,
        )  # fmt: skip
    for offset in range(placed, budget, LIST):
        place = offset + tl.arange(0, LIST)
        tl.store(positions + place, tl.full([LIST], -1, tl.int64), mask=place < budget)
    tl.store(counts + pair, placed.to(tl.int64))
