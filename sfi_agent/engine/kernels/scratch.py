"""Buffers between ranking and selection."""

from __future__ import annotations

from math import prod

import torch

__all__ = ["SelectionScratch"]

_CAPACITY_STEP = 1024
_MOST_PEAKS = 16384
_LARGEST_PEAK = 1024


class SelectionScratch:
    """Buffers between ranking and selection, reused by every refresh.

    They take 8 bytes per token and row of keys, and up to 4 more per token for peaks below 16,384
    tokens (64 KB per row from there on): 1.1 MB per row at 131,072 tokens. That is 321 MB per
    sequence of a model with 36 layers and 8 KV heads, a sixtieth of its history in bfloat16 with
    heads of 128, and 40 MB where all heads of a layer share a set.

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
        self._allocate(shape, capacity, device)

    def _allocate(self, shape: tuple[int, ...], capacity: int, device: torch.device) -> None:
        capacity, self.peak_tokens = _rounded(capacity)
        self.keys = torch.empty(*shape, capacity, dtype=torch.int32, device=device)
        self.indices = torch.empty_like(self.keys)
        peaks = capacity // self.peak_tokens
        self.peaks = torch.empty(*shape, peaks, dtype=torch.int32, device=device)

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading axes."""
        return tuple(self.keys.shape[:-1])

    @property
    def capacity(self) -> int:
        """Most tokens of a sequence."""
        return self.keys.shape[-1]

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return self.keys.nbytes + self.indices.nbytes + self.peaks.nbytes

    @staticmethod
    def bytes_for(shape: tuple[int, ...], capacity: int) -> int:
        """What buffers would take, without allocating them."""
        capacity, peak_tokens = _rounded(capacity)
        return 4 * prod(shape) * (2 * capacity + capacity // peak_tokens)

    def grow(self, capacity: int) -> bool:
        """Make room for longer sequences; what was ranked is lost, so nothing is copied.

        The old buffers are given back before the new ones are made, and a capacity that does not
        suffice grows by a quarter at least.

        Returns:
            Whether the buffers moved: views of layers are stale then, and steps captured with them
            must be captured anew.
        """
        if capacity <= self.capacity:
            return False
        shape, device = self.shape, self.keys.device
        wanted = max(capacity, self.capacity + self.capacity // 4)
        self.keys = self.indices = self.peaks = self.keys.new_empty(0)
        self._allocate(shape, wanted, device)
        return True

    def layer(self, index: int) -> SelectionScratch:
        """Views of one layer, for ranking layer by layer and selecting all at once."""
        view = object.__new__(SelectionScratch)
        view.peak_tokens = self.peak_tokens
        view.keys, view.indices = self.keys[index], self.indices[index]
        view.peaks = self.peaks[index]
        return view


def _rounded(capacity: int) -> tuple[int, int]:
    """Whole tiles, and how many neighbours share a peak."""
    capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
    peak_tokens = 1
    while capacity // peak_tokens > _MOST_PEAKS:
        peak_tokens *= 2
    assert peak_tokens <= _LARGEST_PEAK, "more than 8 million tokens"
    return capacity, peak_tokens
