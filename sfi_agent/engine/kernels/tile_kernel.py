# mypy: ignore-errors
"""Triton source of the parts of attention that work on one tile. Importing it imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LOG2_E",
    "TABLE_FIELDS",
    "absorb",
    "extent_pointers",
    "scaled_logits",
    "store_evidence",
]

LOG2_E = tl.constexpr(1.4426950408889634)
TABLE_FIELDS = tl.constexpr(5)


@triton.jit
def scaled_logits(query, keys, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits in nats, `[rows, tokens]`; tanh is written with the sigmoid that every target has."""
    logits = tl.dot(query, keys, input_precision="ieee") * scale
    if SOFTCAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits


@triton.jit
def absorb(logits, values, peak, total, mixed, LAZY: tl.constexpr, VALUES: tl.constexpr):
    """Take one tile into the running softmax; `peak` is in bits, a row may see nothing yet.

    Lazily, `total` is kept per column of the tile and summed at the end: rows are spread over all
    warps where there are few of them, and a sum across warps costs a barrier.
    """
    bits = logits * LOG2_E
    new_peak = tl.maximum(peak, tl.max(bits, 1))
    finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shrink = tl.exp2(peak - finite_peak)
    weights = tl.exp2(bits - finite_peak[:, None])
    if LAZY:
        total = total * shrink[:, None] + weights
    else:
        total = total * shrink + tl.sum(weights, 1)
    if VALUES:
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
    return new_peak, total, mixed


@triton.jit
def store_evidence(evidence, logits, evidence_row, position, first, stop, stride):
    """Write the logits of the asked rows at their absolute positions, candidates only.

    Nothing behind the end of a row: fast rows of a batch may have more slots than it has places.
    """
    target = evidence + evidence_row[:, None] * stride + position[None, :]
    wanted = (position >= first) & (position < tl.minimum(stop, stride))
    tl.store(target, logits, mask=(evidence_row >= 0)[:, None] & wanted[None, :])


@triton.jit
def extent_pointers(table, index, head, pointer_type: tl.constexpr, KEY_DIM: tl.constexpr,
            VALUE_DIM: tl.constexpr):  # fmt: skip
    """Pointers to where position 0 of this head would lie, and the extent's first and last end."""
    field = table + index * TABLE_FIELDS
    first = tl.load(field + 4)
    stop = tl.load(field + TABLE_FIELDS + 4)
    keys = tl.multiple_of(tl.load(field).to(pointer_type), 16)
    keys += head * tl.multiple_of(tl.load(field + 2), 8) - first * KEY_DIM
    values = tl.multiple_of(tl.load(field + 1).to(pointer_type), 16)
    values += head * tl.multiple_of(tl.load(field + 3), 8) - first * VALUE_DIM
    return keys, values, first.to(tl.int32), stop.to(tl.int32)
