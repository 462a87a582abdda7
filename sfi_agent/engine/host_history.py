"""Host memory for histories that are longer than the memory of the device has room for.

Buffers are pinned, so that copies run beside the computation. They come in chunks whose bytes are
powers of two, because that is how torch's allocator of pinned memory rounds, and a history that
needs more room gets another chunk instead of a larger copy of what it has: nothing of a history
in host memory ever moves.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sfi_agent.engine.copy_lanes import CopyLane, Mark, make_lane
from sfi_agent.observe.log import log_event

__all__ = ["HostStore", "by_head", "carve", "next_power"]

_LARGEST_CHUNK_BYTES = 1 << 26
"""Of keys or of values. Larger chunks would be copied no faster, and pinned in longer pauses."""

_OUTGOING_ROOMS = 2
"""New keys and values of one layer leave while those of the next are computed."""

_ALIGNMENT_BYTES = 256


class HostStore:
    """Where sequences of one model keep histories that do not live on its device.

    What is written arrives later: on the device marks take care of that, and whoever reads on the
    host settles first (`LayerHistory.pieces` does). Sessions of several threads may write at once.

    Args:
        device: Of the model.
        lane: Carries what is written; None makes one.
        pin: Whether to pin memory; None pins where the device is a CUDA device.
        largest_chunk_bytes: Of the keys or of the values of one buffer.

    Attributes:
        pins: Whether new buffers are pinned; false once that has failed, which is logged.
    """

    def __init__(
        self,
        device: torch.device,
        lane: CopyLane | None = None,
        *,
        pin: bool | None = None,
        largest_chunk_bytes: int = _LARGEST_CHUNK_BYTES,
    ) -> None:
        self.device = device
        self.pins = device.type == "cuda" if pin is None else pin
        self._largest_chunk_bytes = largest_chunk_bytes
        self._lane = lane or make_lane(device)
        self._outgoing = [_Room(device) for _ in range(_OUTGOING_ROOMS)]
        self._turn = 0
        self._written: Mark | None = None
        self._lock = threading.Lock()

    @property
    def written(self) -> Mark | None:
        """When everything that was written has arrived; None if it has."""
        return self._written

    @property
    def device_bytes(self) -> int:
        """What the store keeps on the device: new tokens on their way."""
        return sum(room.bytes.nbytes for room in self._outgoing)

    def capacity(self, keys: Tensor, values: Tensor, wanted_tokens: int) -> int:
        """Tokens of a buffer for keys and values like these; fewer than wanted where one buffer
        would be too large."""
        token_bytes = max(_token_bytes(keys), _token_bytes(values))
        size = min(next_power(wanted_tokens * token_bytes), self._largest_chunk_bytes)
        return max(1, size // token_bytes)

    def empty(self, like: Tensor, capacity: int) -> Tensor:
        """Room for `[kv_heads, capacity, dim]`, pinned if that can be had."""
        shape = (like.shape[0], capacity, like.shape[2])
        if self.pins:
            try:
                return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self.pins = False
                reason = str(error).splitlines()[0]
                log_event("warning", "pinned_memory_missing", reason=reason)
        return torch.empty(shape, dtype=like.dtype, device="cpu")

    def write(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy new keys and values into buffers of this store.

        The sources may be written again at once: they are copied aside first.

        Args:
            pairs: Target and source of each, `[kv_heads, tokens, dim]`; targets are parts of
                buffers of this store.
        """
        if any(source.device.type != self.device.type for _, source in pairs):
            # From somewhere else, such as a file: nothing to overlap with.
            self.settle()
            for target, source in pairs:
                target.copy_(source)
            return
        with self._lock:
            self._turn = (self._turn + 1) % len(self._outgoing)
            room = self._outgoing[self._turn]
            staged = room.filled(pairs)
            room.sent = self._written = self._lane.copy(by_head(staged), [self._lane.note()])

    def settle(self) -> None:
        """Let the host wait until everything that was written has arrived."""
        mark = self._written
        if mark is None:
            return
        mark.wait()
        with self._lock:
            if self._written is mark:
                self._written = None


class _Room:
    """Device memory that new tokens leave from.

    Args:
        device: Where it is.

    Attributes:
        bytes: Of any size; grows when needed.
        sent: When what lies in it has left.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self.sent: Mark | None = None

    def filled(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Targets with contiguous copies of their sources, in this room."""
        if self.sent is not None:
            # Also before the room is given back: it then belongs to whatever is computed next.
            self.sent.hold()
        offsets, end = [], 0
        for _, source in pairs:
            offsets.append(end)
            end += -(-source.numel() * source.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self.bytes.numel() < end:
            self.bytes = self.bytes.new_empty(0)
            self.bytes = self.bytes.new_empty(next_power(end))
        staged = []
        for (target, source), offset in zip(pairs, offsets, strict=True):
            copied = carve(self.bytes, offset, source.shape, source.dtype).copy_(source)
            staged.append((target, copied))
        return staged


def next_power(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def carve(room: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor in the bytes of a room, which has to be large enough.

    Args:
        room: `[bytes]` uint8.
        offset: First byte, a multiple of the size of an element.
        shape: Of the tensor.
        dtype: Likewise.
    """
    size = math.prod(shape) * dtype.itemsize
    return room[offset : offset + size].view(dtype).view(*shape)


def by_head(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same copies head by head: the tokens of one head follow each other without gaps."""
    for target, source in pairs:
        yield from zip(target, source, strict=True)


def _token_bytes(like: Tensor) -> int:
    return like.shape[0] * like.shape[2] * like.itemsize
