"""From evidence to selected positions, in two launches for any number of layers and sequences.

Rows of keys are pairs of a sequence and a KV head, of one layer or of many: the leading axes
`[layers, batch, kv_heads]` or `[batch, kv_heads]` are flattened, and lengths are read per sequence
on the device. The score of a candidate is the log of its attention mass, mean over rows up to a
constant, which is what the selector `per_head` ranks by; passing the rows of all KV heads as rows
of one pair gives one set per layer, as `top_k` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfi_agent.engine.kernels.availability import uses_kernels
from sfi_agent.engine.kernels.masks import active_rows, mask_bytes
from sfi_agent.engine.kernels.reference import (
    candidate_range,
    reference_rank,
    reference_select,
)
from sfi_agent.engine.kernels.scratch import SelectionScratch

__all__ = ["rank", "select"]

_RANK_TILE = 1024
_SHORTEN_TILE = 2048
_LIST = 4096
_SELECT_WARPS = 8
_SELECT_REGISTERS = 128
"""So that two programs share a multiprocessor and hide each other's waiting; measured."""


def rank(
    logits: Tensor,
    lse: Tensor,
    tokens: Tensor,
    scratch: SelectionScratch,
    sink_tokens: int,
    recent_tokens: int,
    *,
    kept_first: Tensor | None = None,
    kept_stop: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    """Write the ranking key of every candidate into the scratch.

    Args:
        logits: `[*shape, rows, capacity]` float32, written by a step with evidence.
        lse: `[*shape, rows]` float32, log-sum-exps over everything the rows saw.
        tokens: `[batch]` int64 on the device, the length each sequence has now.
        scratch: Of the same leading axes.
        sink_tokens: Positions below are not candidates.
        recent_tokens: The newest tokens are not candidates.
        kept_first: `[batch]` int64 on the device; candidates at positions
            `[kept_first, kept_stop)` rank above all others. None, for both, keeps none.
        kept_stop: See `kept_first`.
        active: bool or int64 of the leading axes without heads, on the device; where it is 0
            nothing is read or written. None ranks everything.
    """
    assert logits.stride(-1) == 1 and logits.shape[:-2] == scratch.keys.shape[:-1]
    assert (kept_first is None) == (kept_stop is None), "a range has two ends"
    torch.ops.sfi_agent.rank(
        logits,
        lse.contiguous(),
        tokens,
        scratch.keys,
        scratch.peaks,
        sink_tokens,
        recent_tokens,
        scratch.peak_tokens,
        kept_first,
        kept_stop,
        active,
    )


def select(
    scratch: SelectionScratch,
    tokens: Tensor,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    *,
    active: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The best candidates of every row, ties to the lower position.

    Args:
        scratch: Filled by `rank`; its keys are used up.
        tokens: `[batch]` int64 on the device.
        budget: Places per row.
        sink_tokens: As given to `rank`.
        recent_tokens: As given to `rank`.
        active: As given to `rank`; where it is 0, new counts are 0 with positions of no meaning,
            and those in `out` stay as they are.
        out: Positions and counts to write instead of new ones, contiguous.

    Returns:
        Positions `[*shape, budget]` int64, ascending, -1 behind the counts, and counts `[*shape]`
        int64: the budget, or all candidates where there are fewer.
    """
    buffers = (scratch.keys, scratch.peaks, scratch.indices, tokens)
    numbers = (budget, sink_tokens, recent_tokens, scratch.peak_tokens, active)
    if out is not None:
        torch.ops.sfi_agent.select_into(*out, *buffers, *numbers)
        return out
    positions, counts = torch.ops.sfi_agent.select(*buffers, *numbers)
    return positions, counts


def _rank_op(
    logits: Tensor,
    lse: Tensor,
    tokens: Tensor,
    keys: Tensor,
    peaks: Tensor,
    sink_tokens: int,
    recent_tokens: int,
    peak_tokens: int,
    kept_first: Tensor | None = None,
    kept_stop: Tensor | None = None,
    active: Tensor | None = None,
) -> None:
    if not uses_kernels(logits.device, logits.dtype, 64, 64):
        kept = None if kept_first is None or kept_stop is None else (kept_first, kept_stop)
        _rank_slowly(logits, lse, tokens, keys, sink_tokens, recent_tokens, kept, active)
        return
    from sfi_agent.engine.kernels.selection_kernel import rank_kernel

    assert logits.is_contiguous() and keys.is_contiguous() and peaks.is_contiguous()
    rows, (sequences, heads) = logits.shape[-2], keys.shape[-3:-1]
    rows_block = 1 << (rows - 1).bit_length()
    tile = max(peak_tokens, 16, min(_RANK_TILE, 8192 // rows_block))
    tiles = -(-min(logits.shape[-1], keys.shape[-1]) // tile)
    rank_kernel[(tiles, keys[..., 0].numel())](
        logits, lse, tokens, keys, peaks,
        tokens if kept_first is None else kept_first, tokens if kept_stop is None else kept_stop,
        mask_bytes(active, keys.shape[:-2], tokens), sequences, sink_tokens, recent_tokens,
        logits.shape[-1], keys.shape[-1], peaks.shape[-1], heads,
        ROWS=rows, ROWS_BLOCK=rows_block, TILE=tile, PEAK_TOKENS=peak_tokens,
        KEPT=kept_first is not None, MASKED=active is not None, num_warps=4,
    )  # fmt: skip


def _rank_slowly(
    logits: Tensor,
    lse: Tensor,
    tokens: Tensor,
    keys: Tensor,
    sink: int,
    recent: int,
    kept: tuple[Tensor, Tensor] | None,
    active: Tensor | None,
) -> None:
    lengths = tokens.tolist()
    no_range = [(0, 0)] * len(lengths)
    ranges = no_range if kept is None else list(zip(*(end.tolist() for end in kept), strict=True))
    keys, lse = keys.view(-1, *keys.shape[-3:]), lse.view(-1, *lse.shape[-3:])
    logits = logits.view(-1, *logits.shape[-4:])
    for layer, sequence in active_rows(active, *keys.shape[:2]):
        first, last = candidate_range(lengths[sequence], sink, recent)
        rows = logits[layer, sequence, ..., first:last]
        keys[layer, sequence, :, first:last] = reference_rank(
            rows, lse[layer, sequence], [end - first for end in ranges[sequence]]
        )


def _select_op(
    keys: Tensor,
    peaks: Tensor,
    indices: Tensor,
    tokens: Tensor,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    peak_tokens: int,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    positions, counts = _empty_selection(keys, budget)
    if active is not None:
        counts.zero_()
    launch_select(
        positions, counts, keys, peaks, indices, tokens, budget, sink_tokens, recent_tokens,
        peak_tokens, active,
    )  # fmt: skip
    return positions, counts


def launch_select(
    positions: Tensor,
    counts: Tensor,
    keys: Tensor,
    peaks: Tensor,
    indices: Tensor,
    tokens: Tensor,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    peak_tokens: int,
    active: Tensor | None = None,
) -> None:
    """Launch the kernel, results into `positions` and `counts` (see `select`)."""
    assert positions.is_contiguous() and counts.is_contiguous()
    assert positions.shape == (*keys.shape[:-1], budget) and counts.shape == keys.shape[:-1]
    if not uses_kernels(keys.device, torch.float32, 64, 64):
        _select_slowly(positions, counts, keys, tokens, sink_tokens, recent_tokens, active)
        return
    from sfi_agent.engine.kernels.selection_kernel import select_kernel

    assert keys.is_contiguous() and peaks.is_contiguous() and indices.is_contiguous()
    sequences, heads = keys.shape[-3:-1]
    select_kernel[(counts.numel(),)](
        keys, peaks, tokens, indices, positions, counts,
        mask_bytes(active, keys.shape[:-2], tokens), budget, sequences, heads, sink_tokens,
        recent_tokens, keys.shape[-1], peaks.shape[-1],
        PEAK_TOKENS=peak_tokens, PEAKS_BLOCK=1 << (peaks.shape[-1] - 1).bit_length(),
        TILE=_SHORTEN_TILE, LIST=_LIST, MASKED=active is not None, num_warps=_SELECT_WARPS,
        maxnreg=_SELECT_REGISTERS,
    )  # fmt: skip


def _select_slowly(
    positions: Tensor,
    counts: Tensor,
    keys: Tensor,
    tokens: Tensor,
    sink: int,
    recent: int,
    active: Tensor | None,
) -> None:
    budget, lengths = positions.shape[-1], tokens.tolist()
    keys, positions = (each.view(-1, *each.shape[-3:]) for each in (keys, positions))
    counts = counts.view(-1, *counts.shape[-2:])
    for layer, sequence in active_rows(active, *counts.shape[:2]):
        first, last = candidate_range(lengths[sequence], sink, recent)
        found = reference_select(keys[layer, sequence], first, last, budget)
        positions[layer, sequence], counts[layer, sequence] = found


def _empty_selection(keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    positions = keys.new_empty(*keys.shape[:-1], budget, dtype=torch.int64)
    return positions, keys.new_empty(keys.shape[:-1], dtype=torch.int64)


_SELECT_ARGUMENTS = (
    "Tensor(a!) keys, Tensor(b!) peaks, Tensor(c!) indices, Tensor tokens, int budget, "
    "int sink_tokens, int recent_tokens, int peak_tokens, Tensor? active=None"
)
_rank_operation: Any = torch.library.custom_op(
    "sfi_agent::rank",
    _rank_op,
    mutates_args=("keys", "peaks"),
    schema="(Tensor logits, Tensor lse, Tensor tokens, Tensor(a!) keys, Tensor(b!) peaks, "
    "int sink_tokens, int recent_tokens, int peak_tokens, Tensor? kept_first=None, "
    "Tensor? kept_stop=None, Tensor? active=None) -> ()",
)
_select_operation: Any = torch.library.custom_op(
    "sfi_agent::select",
    _select_op,
    mutates_args=("keys", "peaks", "indices"),
    schema=f"({_SELECT_ARGUMENTS}) -> (Tensor, Tensor)",
)
_select_into_operation: Any = torch.library.custom_op(
    "sfi_agent::select_into",
    launch_select,
    mutates_args=("positions", "counts", "keys", "peaks", "indices"),
    schema=f"(Tensor(d!) positions, Tensor(e!) counts, {_SELECT_ARGUMENTS}) -> ()",
)


@_rank_operation.register_fake  # type: ignore[untyped-decorator]
def _rank_fake(*_: Any) -> None:
    return None


@_select_operation.register_fake  # type: ignore[untyped-decorator]
def _select_fake(
    keys: Tensor, peaks: Tensor, indices: Tensor, tokens: Tensor, budget: int, *_: Any
) -> Any:
    return _empty_selection(keys, budget)


@_select_into_operation.register_fake  # type: ignore[untyped-decorator]
def _select_into_fake(*_: Any) -> None:
    return None
