"""Where the keys and values of many sequences lie, in a form that a kernel can follow.

Histories grow and move one by one, memories are one buffer each: a step over a batch reads
addresses from a small table on the device, so that a captured graph stays valid when a buffer
moves. The table keeps the tensors it points at alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FAR_POSITION", "ExtentPlace", "ExtentTable", "LayerExtents"]

FAR_POSITION = 2**30
"""First position of an extent that does not exist; adding tiles to it does not overflow 32 bits."""

_FIELDS = 5
"""Key address, value address, key stride, value stride (elements per head), first position."""


@dataclass(frozen=True, slots=True)
class ExtentPlace:
    """One contiguous run of a sequence.

    Attributes:
        keys: `[kv_heads, capacity, key_dim]`; tokens of a head follow each other without gaps.
        values: `[kv_heads, capacity, value_dim]`, likewise.
        first_position: Position of token 0 of this run; the run ends where the next one begins,
            the last one where the sequence ends.
    """

    keys: Tensor
    values: Tensor
    first_position: int = 0

    def fields(self, aligned: bool = True) -> list[int]:
        """The row of a table; `aligned` is what kernels need and references do not."""
        for tensor in (self.keys, self.values):
            assert tensor.ndim == 3 and tensor.stride(2) == 1, "one head must be contiguous"
            assert tensor.stride(1) == tensor.shape[2], "tokens of a head must be contiguous"
            assert tensor[0].numel() < 2**31, "offsets within a head are 32-bit"
            if aligned:
                assert tensor.data_ptr() % 16 == 0, "kernels load 16 bytes at a time"
                assert tensor.stride(0) % 8 == 0, "heads must begin at multiples of 8 elements"
        return [
            self.keys.data_ptr(),
            self.values.data_ptr(),
            self.keys.stride(0),
            self.values.stride(0),
            self.first_position,
        ]


@dataclass(frozen=True, slots=True)
class LayerExtents:
    """The extents of one layer.

    Attributes:
        fields: `[batch, extents + 1, 5]` int64 on the device; the last row is a sentinel.
        places: Per sequence its extents in order; none for a row that is not used.
    """

    fields: Tensor
    places: tuple[tuple[ExtentPlace, ...], ...]

    @property
    def extents(self) -> int:
        return self.fields.shape[1] - 1

    @property
    def kv_heads(self) -> int:
        return next(places[0] for places in self.places if places).keys.shape[0]


class ExtentTable:
    """The extents of all layers and sequences of a batch.

    Args:
        layers: Number of layers.
        batch: Number of sequences.
        extents: Most extents that a sequence may have; one is the fast case.
        device: Where the steps run.
        aligned: Whether to hold buffers to the alignment that kernels need.

    Attributes:
        fields: `[layers, batch, extents + 1, 5]` int64 on the device, valid after `upload`.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        extents: int,
        device: torch.device,
        *,
        aligned: bool = True,
    ) -> None:
        self._aligned = aligned
        shape = (layers, batch, extents + 1, _FIELDS)
        self._host = torch.zeros(shape, dtype=torch.int64)
        self._host[..., -1] = FAR_POSITION
        self.fields = torch.zeros(shape, dtype=torch.int64, device=device)
        self._places: list[list[tuple[ExtentPlace, ...]]] = [
            [() for _ in range(batch)] for _ in range(layers)
        ]

    @property
    def extents(self) -> int:
        return self.fields.shape[2] - 1

    def place(self, layer: int, sequence: int, places: Sequence[ExtentPlace]) -> None:
        """Say where a sequence's tokens of a layer lie; takes effect with `upload`."""
        assert 0 < len(places) <= self.extents, "more extents than the table has room for"
        starts = [place.first_position for place in places]
        assert starts == sorted(set(starts)), "extents must be in order"
        rows = self._host[layer, sequence]
        rows.zero_()
        rows[:, -1] = FAR_POSITION
        for row, place in zip(rows, places, strict=False):
            row.copy_(torch.tensor(place.fields(self._aligned)))
        self._places[layer][sequence] = tuple(places)

    def clear(self, layer: int, sequence: int) -> None:
        """Let a row have no tokens and no room; takes effect with `upload`.

        Rows begin like this. Steps read nothing there, whatever its length, and append nothing.
        """
        self._host[layer, sequence] = 0
        self._host[layer, sequence, :, -1] = FAR_POSITION
        self._places[layer][sequence] = ()

    @property
    def any_place(self) -> ExtentPlace:
        """Some extent; all layers of a table have the same heads, sizes and dtype."""
        return next(rows[0] for layer in self._places for rows in layer if rows)

    def upload(self) -> None:
        """Copy the table to the device, ordered before the steps launched afterwards.

        Not while a step is captured: the copy's source is gone when the step is replayed.
        """
        host = self._host
        if self.fields.device.type == "cuda":
            # A pinned copy of its own: `place` may change the table before this one has arrived,
            # and torch keeps pinned memory until the transfers from it are done.
            host = host.pin_memory()
        self.fields.copy_(host, non_blocking=True)

    def layer(self, index: int) -> LayerExtents:
        """The table of one layer, for the attention of that layer."""
        return LayerExtents(self.fields[index], tuple(self._places[index]))
