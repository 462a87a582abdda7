"""Reads the pictures that a browser takes: 8-bit RGB or RGBA PNG without interlacing."""

from __future__ import annotations

import struct
import zlib
from collections import Counter

__all__ = ["colours"]

_CHANNELS = {2: 3, 6: 4}


def colours(data: bytes) -> Counter[tuple[int, int, int]]:
    """How often each colour occurs in a picture."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a PNG")
    width = height = channels = 0
    packed = b""
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", content)
            if depth != 8 or colour not in _CHANNELS or interlaced:
                raise ValueError("only 8-bit RGB and RGBA without interlacing are read")
            channels = _CHANNELS[colour]
        elif kind == b"IDAT":
            packed += content
        at += 12 + length
    found: Counter[tuple[int, int, int]] = Counter()
    for line in _lines(zlib.decompress(packed), width * channels, height, channels):
        found.update(zip(line[0::channels], line[1::channels], line[2::channels], strict=True))
    return found


def _lines(raw: bytes, stride: int, height: int, step: int) -> list[bytes]:
    """Undo the filters of the PNG specification, line by line."""
    lines: list[bytes] = []
    above = bytes(stride)
    for number in range(height):
        start = number * (stride + 1)
        line = bytearray(raw[start + 1 : start + 1 + stride])
        kind = raw[start]
        for index in range(stride):
            left = line[index - step] if index >= step else 0
            corner = above[index - step] if index >= step else 0
            line[index] = (line[index] + _guess(kind, left, above[index], corner)) & 255
        above = bytes(line)
        lines.append(above)
    return lines


def _guess(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 0:
        return 0
    if kind == 1:
        return left
    if kind == 2:
        return up
    if kind == 3:
        return (left + up) // 2
    base = left + up - corner
    return min((abs(base - value), order, value) for order, value in enumerate((left, up, corner)))[
        2
    ]
