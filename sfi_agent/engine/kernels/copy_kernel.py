# mypy: ignore-errors
"""Triton source of what copies tokens between extents. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["copy_rows", "head_pointers"]


@triton.jit
def head_pointers(field, head, pointer_type: tl.constexpr):
    """Pointers to the keys and values of an extent's first token, for one head."""
    keys = tl.multiple_of(tl.load(field).to(pointer_type), 16)
    keys += head * tl.multiple_of(tl.load(field + 2), 8)
    values = tl.multiple_of(tl.load(field + 1).to(pointer_type), 16)
    values += head * tl.multiple_of(tl.load(field + 3), 8)
    return keys, values


@triton.jit
def copy_rows(
    source, target, source_row, target_row, wanted, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy whole tokens of one head; rows are counted from the pointers."""
    column = tl.arange(0, BLOCK)
    mask = wanted[:, None] & (column < DIM)[None, :]
    rows = tl.load(source + source_row[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    tl.store(target + target_row[:, None] * DIM + column[None, :], rows, mask=mask)
