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
_CACHED_ROWS = 256
"""Added up along both sides before the next ones: 2 MiB, which many a cache holds. A quarter of it
is no slower by itself, but threads that compute digests at once then wait for Python."""


def digest_of(*pieces: Tensor) -> bytes:
    """The digest of bytes, in one piece or in several that follow each other.

    Args:
        pieces: `[bytes]` uint8 each, contiguous, all on one device.
    """
    sums = _Sums()
    for piece in pieces:
        sums.add(piece)
    return sums.digest()


class _Sums:
    """Rows as they come, of pieces that end anywhere."""

    def __init__(self) -> None:
        self._bytes = 0
        self._of_rows: list[Tensor] = []
        self._of_columns: Tensor | None = None
        self._begun: list[Tensor] = []
        self._missing_bytes = 0

    def add(self, piece: Tensor) -> None:
        self._bytes += piece.numel()
        first = min(self._missing_bytes, piece.numel())
        if first:
            self._begun.append(piece[:first])
            self._missing_bytes -= first
            if not self._missing_bytes:
                self._add_rows(torch.cat(self._begun))
                self._begun = []
        rest = piece[first:]
        whole = rest.numel() // _ROW_BYTES * _ROW_BYTES
        if whole:
            self._add_rows(rest[:whole])
        if whole < rest.numel():
            self._begun = [rest[whole:]]
            self._missing_bytes = _ROW_BYTES - (rest.numel() - whole)

    def digest(self) -> bytes:
        found = hashlib.sha256(self._bytes.to_bytes(8, "little"))
        if self._of_columns is not None:
            for sums in (torch.cat(self._of_rows), self._of_columns):
                found.update(host_bytes(as_bytes(sums)))
        for part in self._begun:
            found.update(host_bytes(part))
        return found.digest()

    def _add_rows(self, data: Tensor) -> None:
        if data.data_ptr() % 8 or data.storage_offset() % 8:
            data = data.clone()
        rows = data.view(torch.int64).view(-1, _ROW_WORDS)
        for block in rows.split(_CACHED_ROWS) if data.device.type == "cpu" else (rows,):
            self._of_rows.append(block.sum(1))
            columns = block.sum(0)
            self._of_columns = (
                columns if self._of_columns is None else self._of_columns.add_(columns)
            )


def as_bytes(tensor: Tensor) -> Tensor:
    """The bits of a tensor as `[bytes]` uint8, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def host_bytes(data: Tensor) -> memoryview:
    """`[bytes]` uint8 as something that files and hashes take; not copied on a CPU."""
    return data.cpu().numpy().data
