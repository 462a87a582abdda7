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
from sfi_agent.engine.kernels.reference import (
    candidate_range,
    reference_rank,
    reference_select,
)

__all__ = ["SelectionScratch", "rank", "select"]

_CAPACITY_STEP = 1024
_RANK_TILE = 1024
_SHORTEN_TILE = 2048
_LIST = 4096
_SELECT_WARPS = 8
_SELECT_REGISTERS = 128
"""So that two programs share a multiprocessor and hide each other's waiting; measured."""

_MOST_PEAKS = 16384
_LARGEST_PEAK = 1024


class SelectionScratch:
    """Buffers between ranking and selection, reused by every refresh.

    Args:
        shape: Leading axes, ending with batch and KV heads (1 if all heads share a set).
        capacity: Most tokens of a sequence; rounded up to whole tiles.
        device: Where the steps run.

    Attributes:
        keys: `[*shape, capacity]` int32, higher is better; shortened in place by `select`.
        peaks: `[*shape, capacity / peak_tokens]` int32, the largest key of each few neighbours;
            used up by `select`.
        indices: `[*shape, capacity]` int32, positions of the shortened keys.
        peak_tokens: Neighbours per peak.
    """

    def __init__(self, shape: tuple[int, ...], capacity: int, device: torch.device) -> None:
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        self.peak_tokens = 1
        while capacity // self.peak_tokens > _MOST_PEAKS:
            self.peak_tokens *= 2
        assert self.peak_tokens <= _LARGEST_PEAK, "more than 8 million tokens"
        self.keys = torch.empty(*shape, capacity, dtype=torch.int32, device=device)
        self.indices = torch.empty_like(self.keys)
        peaks = capacity // self.peak_tokens
        self.peaks = torch.empty(*shape, peaks, dtype=torch.int32, device=device)

    def layer(self, index: int) -> SelectionScratch:
        """Views of one layer, for ranking layer by layer and selecting all at once."""
        view = object.__new__(SelectionScratch)
        view.peak_tokens = self.peak_tokens
        view.keys, view.indices = self.keys[index], self.indices[index]
        view.peaks = self.peaks[index]
        return view


def rank(
    logits: Tensor,
    lse: Tensor,
    tokens: Tensor,
    scratch: SelectionScratch,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """Write the ranking key of every candidate into the scratch.

    Args:
        logits: `[*shape, rows, capacity]` float32, written by a step with evidence.
        lse: `[*shape, rows]` float32, log-sum-exps over everything the rows saw.
        tokens: `[batch]` int64 on the device, the length each sequence has now.
        scratch: Of the same leading axes.
        sink_tokens: Positions below are not candidates.
        recent_tokens: The newest tokens are not candidates.
    """
    assert logits.stride(-1) == 1 and logits.shape[:-2] == scratch.keys.shape[:-1]
    torch.ops.sfi_agent.rank(
        logits,
        lse.contiguous(),
        tokens,
        scratch.keys,
        scratch.peaks,
        sink_tokens,
        recent_tokens,
        scratch.peak_tokens,
    )


def select(
    scratch: SelectionScratch, tokens: Tensor, budget: int, sink_tokens: int, recent_tokens: int
) -> tuple[Tensor, Tensor]:
    """The best candidates of every row, ties to the lower position.

    Args:
        scratch: Filled by `rank`; its keys are used up.
        tokens: `[batch]` int64 on the device.
        budget: Places per row.
        sink_tokens: As given to `rank`.
        recent_tokens: As given to `rank`.

    Returns:
        Positions `[*shape, budget]` int64, ascending, -1 behind the counts, and counts `[*shape]`
        int64: the budget, or all candidates where there are fewer.
    """
    positions, counts = torch.ops.sfi_agent.select(
        scratch.keys,
        scratch.peaks,
        scratch.indices,
        tokens,
        budget,
        sink_tokens,
        recent_tokens,
        scratch.peak_tokens,
    )
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
) -> None:
    rows = logits.shape[-2]
    sequences, heads = keys.shape[-3:-1]
    if not uses_kernels(logits.device, logits.dtype, 64, 64):
        _rank_slowly(logits, lse, tokens, keys, sink_tokens, recent_tokens)
        return
    from sfi_agent.engine.kernels.selection_kernel import rank_kernel

    assert logits.is_contiguous() and keys.is_contiguous() and peaks.is_contiguous()
    rows_block = 1 << (rows - 1).bit_length()
    tile = max(peak_tokens, 16, min(_RANK_TILE, 8192 // rows_block))
    tiles = -(-min(logits.shape[-1], keys.shape[-1]) // tile)
    rank_kernel[(tiles, keys[..., 0].numel())](
        logits, lse, tokens, keys, peaks, sequences, sink_tokens, recent_tokens,
        logits.shape[-1], keys.shape[-1], peaks.shape[-1], heads,
        ROWS=rows, ROWS_BLOCK=rows_block, TILE=tile, PEAK_TOKENS=peak_tokens, num_warps=4,
    )  # fmt: skip


def _rank_slowly(
    logits: Tensor, lse: Tensor, tokens: Tensor, keys: Tensor, sink: int, recent: int
) -> None:
    for sequence, length in enumerate(tokens.tolist()):
        first, last = candidate_range(length, sink, recent)
        place = (..., sequence, slice(None), slice(first, last))
        rows = (..., sequence, slice(None), slice(None), slice(first, last))
        keys[place] = reference_rank(logits[rows], lse[..., sequence, :, :])


def _select_op(
    keys: Tensor,
    peaks: Tensor,
    indices: Tensor,
    tokens: Tensor,
    budget: int,
    sink_tokens: int,
    recent_tokens: int,
    peak_tokens: int,
) -> tuple[Tensor, Tensor]:
    positions, counts = _empty_selection(keys, budget)
    launch_select(
        positions, counts, keys, peaks, indices, tokens, budget, sink_tokens, recent_tokens,
        peak_tokens,
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
) -> None:
    """Launch the kernel, results into `positions` and `counts` (see `select`)."""
    sequences, heads = keys.shape[-3:-1]
    if not uses_kernels(keys.device, torch.float32, 64, 64):
        for sequence, length in enumerate(tokens.tolist()):
            first, last = candidate_range(length, sink_tokens, recent_tokens)
            rows = keys[..., sequence, :, :]
            found, number = reference_select(rows.flatten(0, -2), first, last, budget)
            positions[..., sequence, :, :] = found.reshape(*rows.shape[:-1], budget)
            counts[..., sequence, :] = number.reshape(rows.shape[:-1])
        return
    from sfi_agent.engine.kernels.selection_kernel import select_kernel

    assert keys.is_contiguous() and peaks.is_contiguous() and indices.is_contiguous()
    select_kernel[(counts.numel(),)](
        keys, peaks, tokens, indices, positions, counts, budget, sequences, heads, sink_tokens,
        recent_tokens, keys.shape[-1], peaks.shape[-1],
        PEAK_TOKENS=peak_tokens, PEAKS_BLOCK=1 << (peaks.shape[-1] - 1).bit_length(),
        TILE=_SHORTEN_TILE, LIST=_LIST, num_warps=_SELECT_WARPS,
        maxnreg=_SELECT_REGISTERS,
    )  # fmt: skip


def _empty_selection(keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    positions = keys.new_empty(*keys.shape[:-1], budget, dtype=torch.int64)
    return positions, keys.new_empty(keys.shape[:-1], dtype=torch.int64)


_rank_operation: Any = torch.library.custom_op(
    "sfi_agent::rank",
    _rank_op,
    mutates_args=("keys", "peaks"),
    schema="(Tensor logits, Tensor lse, Tensor tokens, Tensor(a!) keys, Tensor(b!) peaks, "
    "int sink_tokens, int recent_tokens, int peak_tokens) -> ()",
)
_select_operation: Any = torch.library.custom_op(
    "sfi_agent::select",
    _select_op,
    mutates_args=("keys", "peaks", "indices"),
    schema="(Tensor(a!) keys, Tensor(b!) peaks, Tensor(c!) indices, Tensor tokens, int budget, "
    "int sink_tokens, int recent_tokens, int peak_tokens) -> (Tensor, Tensor)",
)


@_rank_operation.register_fake  # type: ignore[untyped-decorator]
def _rank_fake(*_: Any) -> None:
    return None


@_select_operation.register_fake  # type: ignore[untyped-decorator]
def _select_fake(
    keys: Tensor, peaks: Tensor, indices: Tensor, tokens: Tensor, budget: int, *_: Any
) -> Any:
    return _empty_selection(keys, budget)
