"""Digests of many bytes at the speed of memory, on whatever device they are.

The bytes are read as rows of 64-bit numbers. Sums of all rows and of all columns, modulo 2^64,
change with any single bit, and with a move from one place to another; what is hashed are those
sums. That finds damage and tells weights apart; it is no proof against somebody who wants two texts
with one digest, and such a person could write another digest beside the bytes anyway.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["DIGEST_BYTES", "as_bytes", "digest_of", "host_bytes"]

DIGEST_BYTES = 32
_ROW_WORDS = 1024
_ROW_BYTES = 8 * _ROW_WORDS


def digest_of(data: Tensor) -> bytes:
    """The digest of `[bytes]` uint8, contiguous, on any device."""
    whole = data.numel() // _ROW_BYTES * _ROW_BYTES
    found = hashlib.sha256(data.numel().to_bytes(8, "little"))
    if whole:
        body = data[:whole]
        if body.storage_offset() % 8:
            body = body.clone()
        rows = body.view(torch.int64).view(-1, _ROW_WORDS)
        for dim in (1, 0):
            found.update(host_bytes(as_bytes(rows.sum(dim))))
    found.update(host_bytes(data[whole:]))
    return found.digest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The bits of a tensor as `[bytes]` uint8, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def host_bytes(data: Tensor) -> memoryview:
    """`[bytes]` uint8 as something that files and hashes take; not copied on a CPU."""
    return data.cpu().numpy().data
