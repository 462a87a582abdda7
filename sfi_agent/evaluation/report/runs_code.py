"""Packs a selection into few characters: the page may carry hundreds of them.

A run of positions becomes three numbers (gap to the run before, length, count), each as base-128
digits, least significant first, with the high bit set on all but the last; the bytes are base64.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["pack_runs", "unpack_runs"]


def pack_runs(runs: Iterable[Sequence[int]]) -> str:
    """Encode ascending runs (start, length, count), none overlapping another."""
    data = bytearray()
    end = 0
    for start, length, count in runs:
        for number in (start - end, length, count):
            data.extend(_digits(number))
        end = start + length
    return base64.b64encode(bytes(data)).decode("ascii")


def unpack_runs(text: str) -> list[tuple[int, int, int]]:
    """What `pack_runs` packed; the page does the same in its own language."""
    numbers = _numbers(base64.b64decode(text, validate=True))
    runs = []
    end = 0
    for gap, length, count in zip(numbers, numbers, numbers, strict=True):
        runs.append((end + gap, length, count))
        end += gap + length
    return runs


def _digits(number: int) -> Iterator[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number


def _numbers(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield number
            number = shift = 0
