# mypy: ignore-errors
"""Triton source of linear layers over few rows, which are bound by reading weights once.

One row is an elementwise product with 16-byte loads; 2 to 16 rows are a product of matrix units
with the rows padded to 16. All weights that share an input are read by one launch: a program owns
`BLOCK_OUT` outputs of one of them, or pairs of gate and up side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["linear_kernel"]


@triton.jit
def _choose(slot, first, second, third, COUNT: tl.constexpr):
    chosen = first
    if COUNT > 1:
        chosen = tl.where(slot == 1, second, chosen)
    if COUNT > 2:
        chosen = tl.where(slot == 2, third, chosen)
    return chosen


@triton.jit
def _wait_for_inputs(lines, begin, width, PREFETCH: tl.constexpr, PDL: tl.constexpr):
    """Fetch weights into the second-level cache while earlier kernels run, then wait for those.

    Weights are nobody's output, so reading them early is safe. Later kernels may be launched only
    behind the wait: whoever sees this grid started may rely on all grids before it.
    """
    if PDL:
        if PREFETCH > 0:
            LINE: tl.constexpr = 128 // (lines.dtype.element_ty.primitive_bitwidth // 8)
            column = tl.minimum(begin + LINE * tl.arange(0, PREFETCH // LINE), width - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                [lines[:, None] + column[None, :]], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _load(pointers, column, width, EVEN_IN: tl.constexpr):
    """A tile of weights, which are read once: first to leave the cache."""
    if EVEN_IN:
        return tl.load(pointers + column[None, :], eviction_policy="evict_first")
    known = column[None, :] < width
    return tl.load(pointers + column[None, :], mask=known, other=0.0, eviction_policy="evict_first")


@triton.jit
def _one_row(
    x, lines, width, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, EVEN_IN: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of one row with `BLOCK_OUT` lines of weights, summed over the width."""
    column = tl.arange(0, BLOCK_IN)
    pointers = lines[:, None]
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    if STAGES == 1:
        # The next tile is on its way in registers while this one is used, across the wait too.
        tile = _load(pointers, column, width, EVEN_IN)
        _wait_for_inputs(lines, BLOCK_IN, width, PREFETCH, PDL)
        for start in range(0, width, BLOCK_IN):
            following = _load(pointers, start + BLOCK_IN + column, width, False)
            vector = tl.load(x + start + column, mask=start + column < width, other=0.0)
            total += tile.to(tl.float32) * vector.to(tl.float32)[None, :]
            tile = following
    else:
        _wait_for_inputs(lines, 0, width, PREFETCH, PDL)
        for start in tl.range(0, width, BLOCK_IN, num_stages=STAGES):
            tile = _load(pointers, start + column, width, EVEN_IN)
            vector = tl.load(x + start + column, mask=start + column < width, other=0.0)
            total += tile.to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(total, 1)[None, :]


@triton.jit
def _many_rows(
    x, lines, width, rows, split, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, EVEN_IN: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products of up to `ROWS` rows with lines of weights over this split's share of the width."""
    column = tl.arange(0, BLOCK_IN)
    row = tl.arange(0, ROWS)
    share = tl.cdiv(tl.cdiv(width, BLOCK_IN), SPLITS) * BLOCK_IN
    begin = split * share
    pointers = lines[:, None]
    total = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    _wait_for_inputs(lines, begin, width, PREFETCH, PDL)
    for start in tl.range(begin, tl.minimum(width, begin + share), BLOCK_IN, num_stages=STAGES):
        tile = _load(pointers, start + column, width, EVEN_IN)
        known = (row < rows)[:, None]
        if not EVEN_IN:
            known = known & (start + column < width)[None, :]
        source = x + row[:, None] * width + (start + column)[None, :]
        inputs = tl.load(source, mask=known, other=0.0)
        total = tl.dot(inputs, tl.trans(tile), total, input_precision="ieee")
    return total


@triton.jit
def _finish(
    total, bias, out, slot, column, outputs, rows, first, GATED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Add biases, or gate, and store `[rows, outputs]`; gates round as separate layers do."""
    row = tl.arange(0, ROWS)
    dtype = out.dtype.element_ty
    if GATED:
        gate, up = tl.split(tl.reshape(total, [ROWS, BLOCK_OUT // 2, 2]))
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        column = first + tl.arange(0, BLOCK_OUT // 2)
    elif BIAS > 0:
        known = (column < outputs) & (((BIAS >> slot) & 1) == 1)
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    target = out + row[:, None] * outputs + column[None, :]
    tl.store(target, total.to(dtype), mask=(row < rows)[:, None] & (column < outputs)[None, :])


@triton.jit
def _block_of(program, n0, n1, COUNT: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """Which of the weights a program belongs to, and which block of its outputs is its own."""
    slot, block = 0, program
    if COUNT > 1:
        blocks = tl.cdiv(n0, BLOCK_OUT)
        slot = (program >= blocks).to(tl.int32)
        block = program - slot * blocks
    if COUNT > 2:
        more = tl.cdiv(n1, BLOCK_OUT)
        last = (program >= blocks + more).to(tl.int32)
        slot, block = slot + last, block - last * more
    return slot, block


@triton.jit
def _leave_part(
    total, partial, counters, program, split, rows, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Store this split's sums; which splits of the program were finished before it."""
    row, line = tl.arange(0, ROWS), tl.arange(0, BLOCK_OUT)
    known = (row < rows)[:, None] & (line >= 0)[None, :]
    place = partial + program * SPLITS * ROWS * BLOCK_OUT
    place = place + row[:, None] * BLOCK_OUT + line[None, :]
    tl.store(place + split * ROWS * BLOCK_OUT, total, mask=known)
    # As in merge_kernel.py: the barrier orders this program's stores before its count, the atomic
    # orders the counts of all before the loads of the last.
    tl.debug_barrier()
    return place, known, tl.atomic_add(counters + program, 1, sem="acq_rel", scope="gpu")


@triton.jit(do_not_specialize=["n0", "n1", "n2", "rows"])
def linear_kernel(
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, n0, n1, n2, width, rows, partial, counters,
    COUNT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, EVEN_IN: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs y_i `[rows, n_i]` of x `[rows, width]` and weights w_i `[n_i, width]`.

    Gated, w0 and w1 are gate and up, and even and odd lines of a program belong to the one and the
    other. Programs (i, s) write block i of all outputs; of several splits s, the last one to
    finish merges them in their order, so results do not depend on timing.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    line = tl.arange(0, BLOCK_OUT)
    if GATED:
        slot, outputs, first = line % 2, n0, program * (BLOCK_OUT // 2)
        column = first + line // 2
        out, bias = y0, b0
    else:
        slot, block = _block_of(program, n0, n1, COUNT, BLOCK_OUT)
        outputs, first = _choose(slot, n0, n1, n2, COUNT), block * BLOCK_OUT
        column = first + line
        out, bias = _choose(slot, y0, y1, y2, COUNT), _choose(slot, b0, b1, b2, COUNT)
    # Lines beyond the last are read as the last and not stored: loads need no mask.
    lines = _choose(slot, w0, w1, w2, COUNT)
    lines = lines + tl.minimum(column, outputs - 1).to(tl.int64) * width
    if ROWS == 1:
        total = _one_row(
            x, lines, width, BLOCK_OUT, BLOCK_IN, EVEN_IN, STAGES, PREFETCH, PDL
        )  # fmt: skip
    else:
        total = _many_rows(
            x, lines, width, rows, split, ROWS, BLOCK_OUT, BLOCK_IN, EVEN_IN, SPLITS, STAGES,
            PREFETCH, PDL,
        )  # fmt: skip
    if SPLITS == 1:
        _finish(
            total, bias, out, slot, column, outputs, rows, first, GATED, BIAS, ROWS, BLOCK_OUT
        )  # fmt: skip
    else:
        place, known, finished = _leave_part(
            total, partial, counters, program, split, rows, ROWS, BLOCK_OUT, SPLITS
        )  # fmt: skip
        if finished == SPLITS - 1:
            total = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
            for share in tl.static_range(SPLITS):
                total += tl.load(place + share * ROWS * BLOCK_OUT, mask=known, other=0.0)
            _finish(
                total, bias, out, slot, column, outputs, rows, first, GATED, BIAS, ROWS, BLOCK_OUT
            )  # fmt: skip
            tl.store(counters + program, 0)
