"""The history of one layer: every key and value of a sequence, in extents that forks share.

A history is a list of extents. An extent is a prefix of a buffer `[kv_heads, capacity, dim]`; only
the last extent may be owned, and only an owned extent is appended to. A fork freezes nothing for
the parent: the child reads the parent's buffers as shared extents and writes its own tail, the
parent goes on appending behind what the child reads. A sequence that never forked is one
contiguous extent, unless its history is kept in host memory (`engine/host_history.py`): there a
buffer that is full is followed by another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.history_buffer import Buffer, empty_buffer
from sfi_agent.engine.host_history import HostStore

__all__ = ["Buffer", "Extent", "LayerHistory", "MoveCounter", "Piece"]

MINIMUM_GROWTH_TOKENS = 1024
"""A full buffer grows by an eighth, but at least by this, so that appending stays amortised."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of the history.

    Attributes:
        start: Absolute position of the first token.
        keys: `[kv_heads, tokens, key_dim]`, post-RoPE, a view of the buffer.
        values: `[kv_heads, tokens, value_dim]`, a view of the buffer.
    """

    start: int
    keys: Tensor
    values: Tensor


@dataclass(slots=True)
class Extent:
    """The first `tokens` tokens of a buffer, as one history sees them."""

    buffer: Buffer
    tokens: int
    owned: bool


@dataclass(slots=True)
class MoveCounter:
    """See `LayerHistory.moves`."""

    count: int = 0


class LayerHistory:
    """All keys and values of one layer of one sequence. Nothing is ever evicted.

    Args:
        reserve_tokens: Capacity of the first buffer, so that a session of known length never
            moves; in host memory that of the first few buffers together.
        store: The host memory that new tokens go to; None keeps them on the device they come from.

    Attributes:
        extents: In order; only the last one may be owned, and in host memory those before it that
            the same history has filled.
        moves: Counts changes of where tokens lie or will be written, for those who keep addresses;
            the layers of a sequence share one.
    """

    def __init__(self, reserve_tokens: int = 0, store: HostStore | None = None) -> None:
        self.extents: list[Extent] = []
        self.reserve_tokens = reserve_tokens
        self.store = store
        self.moves = MoveCounter()
        self._spare: list[Buffer] = []

    @property
    def tokens(self) -> int:
        return sum(extent.tokens for extent in self.extents)

    @property
    def owned_buffers(self) -> list[Buffer]:
        """Those this history writes to; shared ones belong to another."""
        return [extent.buffer for extent in self.extents if extent.owned] + self._spare

    @property
    def owned_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.owned_buffers)

    @property
    def streamed(self) -> bool:
        """Whether tokens lie, or will lie, in host memory."""
        if self.store is not None:
            return True
        return any(extent.buffer.home is not None for extent in self.extents)

    @property
    def kv_heads(self) -> int:
        """Of a history that is not empty."""
        return self.extents[0].buffer.keys.shape[0]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end; on a device the run stays contiguous within one extent.

        Args:
            keys: `[kv_heads, tokens, key_dim]`.
            values: `[kv_heads, tokens, value_dim]`.
        """
        done, new = 0, keys.shape[1]
        while done < new:
            extent = self._with_room(keys, values, new - done)
            part = slice(done, done + min(new - done, extent.buffer.capacity - extent.tokens))
            extent.buffer.write(extent.tokens, keys[:, part], values[:, part])
            extent.tokens += part.stop - done
            done = part.stop

    def make_room(self, new: int) -> None:
        """Let `new` more tokens be written behind the present ones by somebody who has addresses.

        Args:
            new: Room that the last extent will have at least; the history is not empty, and not
                in host memory.
        """
        assert self.store is None, "nobody else writes to host memory"
        last = self.extents[-1]
        self._with_room(last.buffer.keys, last.buffer.values, new, MINIMUM_GROWTH_TOKENS)

    def note_written(self, new: int) -> None:
        """Tokens were written into the room that `make_room` made."""
        self.extents[-1].tokens += new

    def cut(self, tokens: int) -> None:
        """Forget everything from position `tokens` on.

        A buffer that others read is not written below what they see: the next `append` then
        starts a new extent.
        """
        surplus = self.tokens - tokens
        assert surplus >= 0, f"cannot cut {self.tokens} tokens to {tokens}"
        while surplus:
            extent = self.extents[-1]
            dropped = min(surplus, extent.tokens)
            extent.tokens -= dropped
            surplus -= dropped
            if extent.owned:
                shared = extent.buffer.shared_tokens
                # Below what others read, the next token begins an extent of its own.
                self.moves.count += extent.tokens < shared
                limit = max(extent.tokens, shared)
                extent.buffer.normed_tokens = min(extent.buffer.normed_tokens, limit)
            if extent.tokens == 0:
                self._drop(self.extents.pop())

    def fork(self) -> LayerHistory:
        """A history that reads the same tokens and copies none of them."""
        child = LayerHistory()
        for extent in self.extents:
            child.extents.append(Extent(extent.buffer, extent.tokens, owned=False))
            extent.buffer.shared_tokens = max(extent.buffer.shared_tokens, extent.tokens)
        return child

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[Piece]:
        """The contiguous runs that cover positions `start` (inclusive) to `end` (exclusive).

        Whoever reads what lies in host memory reads it on the host.
        """
        self.settle()
        stop = self.tokens if end is None else end
        offset = 0
        for extent in self.extents:
            low = max(start - offset, 0)
            high = min(stop - offset, extent.tokens)
            if low < high:
                keys = extent.buffer.keys[:, low:high]
                values = extent.buffer.values[:, low:high]
                yield Piece(offset + low, keys, values)
            offset += extent.tokens

    def joined(self, start: int, end: int) -> Piece:
        """The range as one run: a view where it lies in one extent, else a copy."""
        pieces = list(self.pieces(start, end))
        if len(pieces) == 1:
            return pieces[0]
        keys = _joined([piece.keys for piece in pieces])
        values = _joined([piece.values for piece in pieces])
        return Piece(start, keys, values)

    def key_norms(self, start: int, end: int) -> Tensor:
        """L2 norms of the keys at positions `start` to `end`, `[kv_heads, end - start]` float32."""
        self.settle()
        parts = [extent.buffer.norms(extent.tokens) for extent in self.extents]
        norms = parts[0] if len(parts) == 1 else _joined(parts)
        return norms[:, start:end]

    def settle(self) -> None:
        """Let the host wait until everything that was appended is where it belongs."""
        for extent in self.extents:
            if extent.buffer.home is not None:
                extent.buffer.home.settle()

    def _with_room(self, keys: Tensor, values: Tensor, new: int, fresh_tokens: int = 0) -> Extent:
        """The extent that takes the next `new` tokens, of the heads and sizes of `keys`; in host
        memory at least the first of them."""
        last = self._writable_extent()
        if self.store is not None:
            if last is None or last.tokens >= last.buffer.capacity:
                return self._begun(self._chunk(self.store, keys, values, new))
            return last
        if last is None:
            capacity = max(new, fresh_tokens, self.reserve_tokens)
            return self._begun(empty_buffer(keys, values, capacity))
        buffer = last.buffer
        if last.tokens + new > buffer.capacity:
            growth = max(buffer.capacity // 8, MINIMUM_GROWTH_TOKENS)
            capacity = max(buffer.capacity + growth, last.tokens + new)
            last.buffer = buffer.grown(capacity, last.tokens)
            self.moves.count += 1
        return last

    def _writable_extent(self) -> Extent | None:
        """The last extent, if tokens may be appended to its buffer."""
        last = self.extents[-1] if self.extents else None
        if last is None or (last.owned and last.tokens >= last.buffer.shared_tokens):
            return last
        # What stays visible of it is read by others too, so it is never written again.
        last.owned = False
        return None

    def _chunk(self, store: HostStore, keys: Tensor, values: Tensor, new: int) -> Buffer:
        """The next buffer in host memory: of what was reserved, or an eighth of what this history
        has written."""
        if not self._spare:
            own = sum(extent.tokens for extent in self.extents if extent.owned)
            growth = max(own // 8, MINIMUM_GROWTH_TOKENS) if self.extents else 0
            wanted = max(new, growth, self.reserve_tokens - self.tokens)
            while wanted > 0:
                capacity = store.capacity(keys, values, wanted)
                self._spare.append(empty_buffer(keys, values, capacity, store))
                wanted -= capacity
        return self._spare.pop(0)

    def _drop(self, extent: Extent) -> None:
        """An extent that is empty now; pinning memory anew would take long, so it is kept."""
        buffer = extent.buffer
        if extent.owned and buffer.home is not None and not buffer.shared_tokens:
            self._spare.insert(0, buffer)
        self.moves.count += 1

    def _begun(self, buffer: Buffer) -> Extent:
        """A new last extent."""
        fresh = Extent(buffer, 0, owned=True)
        self.extents.append(fresh)
        self.moves.count += 1
        return fresh


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts along the tokens, on the device of the first."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1)
