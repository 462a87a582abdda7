"""Histories in host memory, brought to the device piece by piece while it computes.

A pass says beforehand which histories it will read, in the order of its layers. Their tokens travel
through a few rooms on the device: while one piece is attended to, the next one is on its way, be it
of the same layer or of the next. The rooms serve all layers and sequences of a runner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.copy_lanes import CopyLane, Mark, make_lane
from sfi_agent.engine.history import LayerHistory, Piece
from sfi_agent.engine.history_loads import (
    PADDING_BYTES,
    Item,
    Load,
    items_of,
    laid_out,
    token_bytes,
)
from sfi_agent.engine.host_history import by_head, next_power

__all__ = ["HistoryStream"]

_ROOM_BYTES = 1 << 28
"""Keys and values that travel at once; a short history takes less."""

_ROOMS = 2

_LEAST_ROOM_BYTES = 1 << 20
"""Smaller ones are not taken because memory is short: there is none for a step then either."""

_FREE_SHARE = 4
"""Rooms take at most one in so many of the bytes that are free when they are made."""


@dataclass(slots=True)
class _Room:
    """A part of the device's memory.

    Attributes:
        bytes: `[bytes]` uint8.
        free: When nothing reads it any more.
    """

    bytes: Tensor
    free: Mark


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A load on its way.

    Attributes:
        room: Where it goes.
        piece: What it will be.
        here: When it is.
    """

    room: _Room
    piece: Piece
    here: Mark


class HistoryStream:
    """See the module text.

    Args:
        device: Where pieces are brought.
        lane: Carries them; None makes one.
        room_bytes: Of one room at most. A room holds at least one token.
        rooms: How many there are, at least one; with one nothing overlaps.

    Attributes:
        device: See above.
    """

    def __init__(
        self,
        device: torch.device,
        lane: CopyLane | None = None,
        *,
        room_bytes: int = _ROOM_BYTES,
        rooms: int = _ROOMS,
    ) -> None:
        self.device = device
        self._lane = lane
        self._room_bytes = room_bytes
        self._rooms: list[_Room] = []
        self._number = rooms
        self._idle: deque[_Room] = deque()
        self._planned: deque[tuple[LayerHistory, int, list[Item]]] = deque()
        self._waiting: deque[Load] = deque()
        self._travelling: deque[_Arrival] = deque()
        self._read: _Room | None = None
        self._written: list[Mark] = []
        self._last: Mark | None = None
        self._with_values = True
        self._midway = False

    @property
    def device_bytes(self) -> int:
        """Of the rooms."""
        return sum(room.bytes.nbytes for room in self._rooms)

    @contextmanager
    def reading(
        self, histories: Sequence[LayerHistory], *, with_values: bool = True
    ) -> Iterator[None]:
        """Begin to bring histories, for the length of a with block.

        Args:
            histories: In the order in which their pieces will be asked for: the tokens that they
                have now. Those without tokens in host memory need not be among them.
            with_values: Whether values are brought too; else those of a piece are not valid.
        """
        if not histories:
            yield
            return
        self._with_values = with_values
        self._begin([(history, history.tokens) for history in histories])
        try:
            yield
        finally:
            self._end()
            self._with_values = True

    def pieces(self, history: LayerHistory, tokens: int) -> Iterator[Piece]:
        """The first `tokens` tokens of a history, on the device.

        A piece is valid for computation that is started before the next one is asked for.
        """
        asked = history, tokens
        if self._midway or not self._planned or self._planned[0][:2] != asked:
            # Asked for in another order than was said, or before the last one was read to its end:
            # right all the same, and nothing overlaps until then.
            self._begin([asked])
        _, _, items = self._planned.popleft()
        self._midway = True
        for item in items:
            if isinstance(item, Piece):
                yield item
                continue
            arrival = self._travelling.popleft()
            self._read = arrival.room
            arrival.here.hold()
            yield arrival.piece
            self._release()
            self._send()
        self._midway = False

    def _begin(self, histories: Sequence[tuple[LayerHistory, int]]) -> None:
        if self._lane is None:
            self._lane = make_lane(self.device)
        self._end()
        sizes = [(history, tokens, token_bytes(history)) for history, tokens in histories]
        self._make_rooms(sizes)
        room_bytes = self._rooms[0].bytes.nbytes - PADDING_BYTES if self._rooms else 0
        for history, tokens, size in sizes:
            most = max(1, room_bytes // size) if size else 1
            items = list(items_of(history, tokens, most))
            self._planned.append((history, tokens, items))
            self._waiting += (item for item in items if isinstance(item, Load))
        extents = [extent for history, _ in histories for extent in history.extents]
        homes = {extent.buffer.home for extent in extents}
        # What earlier passes wrote has to be there before it is read.
        self._written = [
            home.written for home in homes if home is not None and home.written is not None
        ]
        self._send()

    def _end(self) -> None:
        """Forget what was planned. What travels arrives, before anything that follows it."""
        self._planned.clear()
        self._waiting.clear()
        self._release()
        self._midway = False
        while self._travelling:
            self._idle.append(self._travelling.popleft().room)

    def _release(self) -> None:
        """What was started so far is the last that reads the piece that was given out."""
        if self._read is not None:
            self._read.free = self._note()
            self._idle.append(self._read)
            self._read = None

    def _send(self) -> None:
        """Let loads travel into the rooms that are free."""
        while self._idle and self._waiting:
            room, load = self._idle.popleft(), self._waiting.popleft()
            piece, pairs = laid_out(load, room.bytes, with_values=self._with_values)
            assert self._lane is not None
            here = self._lane.copy(by_head(pairs), [room.free, *self._written])
            self._written, self._last = [], here
            self._travelling.append(_Arrival(room, piece, here))

    def _make_rooms(self, sizes: Sequence[tuple[LayerHistory, int, int]]) -> None:
        """Rooms for the longest of these histories, or as large as they may be."""
        needed = max(tokens * size for _, tokens, size in sizes)
        if not needed:
            return
        least = max(size for _, _, size in sizes)
        wanted = max(least, min(next_power(needed), self._room_bytes)) + PADDING_BYTES
        present = self._rooms[0].bytes.nbytes if self._rooms else 0
        if present >= wanted:
            return
        share = max(least, _LEAST_ROOM_BYTES, _room_share(self.device) // self._number)
        wanted = min(wanted, share + PADDING_BYTES)
        if present >= wanted:
            return
        self._give_back()
        while not self._rooms:
            try:
                self._rooms = [self._room(wanted) for _ in range(self._number)]
            except torch.OutOfMemoryError:
                wanted //= 2
                if wanted < max(least + PADDING_BYTES, _LEAST_ROOM_BYTES):
                    raise
                self._room_bytes = wanted - PADDING_BYTES
        self._idle = deque(self._rooms)

    def _room(self, size: int) -> _Room:
        # What was there before may still be computed with.
        room = torch.empty(size, dtype=torch.uint8, device=self.device)
        return _Room(room, self._note())

    def _give_back(self) -> None:
        """Free the rooms; what comes to lie there waits for what still travels."""
        if self._last is not None:
            self._last.hold()
        self._idle.clear()
        self._rooms = []

    def _note(self) -> Mark:
        assert self._lane is not None
        return self._lane.note()


def _room_share(device: torch.device) -> int:
    """Bytes that rooms may take together."""
    if device.type != "cuda":
        return 1 << 62
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    return max(0, min(free + unused, allowed)) // _FREE_SHARE
