"""Which sequences of a batch a refresh concerns, as the device holds it.

Rows of a batch refresh one by one, and dense and sliding layers never do: operations over all
layers and sequences take an `active` mask, `[layers, batch]` or `[batch]`, bool or int64, 0 for
what is to be left alone. It is read on the device, so one captured step serves every mix of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["active_rows", "mask_bytes"]


def mask_bytes(active: Tensor | None, shape: tuple[int, ...], unused: Tensor) -> Tensor:
    """The mask as a kernel reads it, or any other tensor where there is none.

    Args:
        active: bool or int64; None stands for everything.
        shape: What the mask must have: the leading axes without heads.
        unused: A tensor on the device, not read by a kernel that is told of no mask.
    """
    if active is None:
        return unused
    assert active.shape == shape, f"a mask of shape {tuple(active.shape)}, not {shape}"
    assert active.dtype in (torch.bool, torch.int64), "masks are bool or int64"
    assert active.is_contiguous(), "masks are contiguous"
    return active.view(torch.uint8) if active.dtype is torch.bool else active


def active_rows(active: Tensor | None, layers: int, batch: int) -> Iterator[tuple[int, int]]:
    """The active pairs of a layer and a sequence, read on the host; for references."""
    wanted = None if active is None else active.reshape(layers, batch).tolist()
    for layer in range(layers):
        for sequence in range(batch):
            if wanted is None or wanted[layer][sequence]:
                yield layer, sequence
