"""How the tokens of a history in host memory are packed into what travels to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from sfi_agent.engine.history import Buffer, LayerHistory, Piece
from sfi_agent.engine.host_history import carve

__all__ = ["PADDING_BYTES", "Item", "Load", "items_of", "laid_out", "token_bytes"]

PADDING_BYTES = 256
"""Room that a load needs beside its keys and values, which begin at a multiple of it."""


class Part(NamedTuple):
    """Tokens `low` to `high` of a buffer in host memory."""

    buffer: Buffer
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Load:
    """What travels together: consecutive tokens of one history.

    Attributes:
        start: Absolute position of the first token.
        parts: In order, at least one.
    """

    start: int
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(part.high - part.low for part in self.parts)


Item: TypeAlias = Load | Piece
"""A load, or a piece that lies on the device already."""


def items_of(history: LayerHistory, tokens: int, most: int) -> Iterator[Item]:
    """The first tokens of a history, what lies in host memory cut in loads of `most` tokens."""
    parts: list[Part] = []
    start = position = room = 0
    for extent in history.extents:
        end = min(extent.tokens, tokens - position)
        buffer, low = extent.buffer, 0
        if buffer.home is None:
            if parts:
                yield Load(start, tuple(parts))
                parts = []
            if end > 0:
                yield Piece(position, buffer.keys[:, :end], buffer.values[:, :end])
            position += max(0, end)
            continue
        while low < end:
            if not parts:
                start, room = position, most
            high = min(end, low + room)
            parts.append(Part(buffer, low, high))
            position, room, low = position + high - low, room - (high - low), high
            if not room:
                yield Load(start, tuple(parts))
                parts = []
    if parts:
        yield Load(start, tuple(parts))


def _copies(
    target: Tensor, sources: Iterable[tuple[Part, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets in a room and their sources, one behind the other."""
    offset = 0
    for part, source in sources:
        end = offset + part.high - part.low
        yield target[:, offset:end], source[:, part.low : part.high]
        offset = end


def token_bytes(history: LayerHistory) -> int:
    """Keys and values of one token; 0 where nothing is there to be brought."""
    if not any(extent.buffer.home is not None for extent in history.extents):
        return 0
    buffer = history.extents[0].buffer
    heads, _, key_dim = buffer.keys.shape
    return heads * (key_dim + buffer.values.shape[2]) * buffer.keys.itemsize


def laid_out(
    load: Load, room: Tensor, *, with_values: bool
) -> tuple[Piece, list[tuple[Tensor, Tensor]]]:
    """Where a load will lie in a room, and the copies that bring it there.

    Args:
        load: At most as many bytes as the room has, padding included.
        room: `[bytes]` uint8 on the device.
        with_values: Whether values are brought too; else the piece has none.
    """
    buffer, tokens = load.parts[0].buffer, load.tokens
    heads, _, key_dim = buffer.keys.shape
    keys = carve(room, 0, (heads, tokens, key_dim), buffer.keys.dtype)
    pairs = list(_copies(keys, [(part, part.buffer.keys) for part in load.parts]))
    if not with_values:
        return Piece(load.start, keys, keys[..., :0]), pairs
    offset = -(-keys.nbytes // PADDING_BYTES) * PADDING_BYTES
    shape = (heads, tokens, buffer.values.shape[2])
    values = carve(room, offset, shape, buffer.values.dtype)
    pairs += _copies(values, [(part, part.buffer.values) for part in load.parts])
    return Piece(load.start, keys, values), pairs
