"""The history of one layer: every key and value of a sequence, in extents that forks share.

A history is a list of extents. An extent is a prefix of a buffer `[kv_heads, capacity, dim]`; only
the last extent may be owned, and only an owned extent is appended to. A fork freezes nothing for
the parent: the child reads the parent's buffers as shared extents and writes its own tail, the
parent goes on appending behind what the child reads. A sequence that never forked is one
contiguous extent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerHistory", "MoveCounter", "Piece"]

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


class Buffer:
    """Storage of one extent, possibly read by several histories.

    Attributes:
        keys: `[kv_heads, capacity, key_dim]`.
        values: `[kv_heads, capacity, value_dim]`.
        shared_tokens: Length of the prefix that other histories read; it is never written again.
        key_norms: `[kv_heads, capacity]` float32 of which the first `normed_tokens` are valid;
            None until somebody asks.
        normed_tokens: See `key_norms`.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.shared_tokens = 0
        self.key_norms: Tensor | None = None
        self.normed_tokens = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def grown(self, capacity: int, used: int) -> Buffer:
        """A larger private copy of the first `used` tokens. Readers of this buffer keep it."""
        bigger = Buffer(_empty(self.keys, capacity), _empty(self.values, capacity))
        bigger.keys[:, :used] = self.keys[:, :used]
        bigger.values[:, :used] = self.values[:, :used]
        return bigger

    def norms(self, tokens: int) -> Tensor:
        """L2 norms of the first `tokens` keys, `[kv_heads, tokens]` float32, kept incrementally."""
        if self.key_norms is None:
            self.key_norms = torch.empty(
                self.keys.shape[:2], dtype=torch.float32, device=self.keys.device
            )
        if self.normed_tokens < tokens:
            fresh = self.keys[:, self.normed_tokens : tokens]
            self.key_norms[:, self.normed_tokens : tokens] = torch.linalg.vector_norm(
                fresh, dim=-1, dtype=torch.float32
            )
            self.normed_tokens = tokens
        return self.key_norms[:, :tokens]


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
            moves.

    Attributes:
        extents: In order; only the last one may be owned.
        moves: Counts changes of where tokens lie or will be written, for those who keep addresses;
            the layers of a sequence share one.
    """

    def __init__(self, reserve_tokens: int = 0) -> None:
        self.extents: list[Extent] = []
        self.reserve_tokens = reserve_tokens
        self.moves = MoveCounter()

    @property
    def tokens(self) -> int:
        return sum(extent.tokens for extent in self.extents)

    @property
    def owned_bytes(self) -> int:
        """Bytes of the buffers this history writes to; shared ones belong to another."""
        buffers = [extent.buffer for extent in self.extents if extent.owned]
        return sum(buffer.keys.nbytes + buffer.values.nbytes for buffer in buffers)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens at the end; the run stays contiguous within one extent.

        Args:
            keys: `[kv_heads, tokens, key_dim]`.
            values: `[kv_heads, tokens, value_dim]`.
        """
        new = keys.shape[1]
        extent = self._with_room(keys, values, new)
        buffer = extent.buffer
        buffer.keys[:, extent.tokens : extent.tokens + new] = keys
        buffer.values[:, extent.tokens : extent.tokens + new] = values
        extent.tokens += new

    def make_room(self, new: int) -> None:
        """Let `new` more tokens be written behind the present ones by somebody who has addresses.

        Args:
            new: Room that the last extent will have at least; the history is not empty.
        """
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
                self.extents.pop()
                self.moves.count += 1

    def fork(self) -> LayerHistory:
        """A history that reads the same tokens and copies none of them."""
        child = LayerHistory()
        for extent in self.extents:
            child.extents.append(Extent(extent.buffer, extent.tokens, owned=False))
            extent.buffer.shared_tokens = max(extent.buffer.shared_tokens, extent.tokens)
        return child

    def pieces(self, start: int = 0, end: int | None = None) -> Iterator[Piece]:
        """The contiguous runs that cover positions `start` (inclusive) to `end` (exclusive)."""
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
        keys = torch.cat([piece.keys for piece in pieces], dim=1)
        values = torch.cat([piece.values for piece in pieces], dim=1)
        return Piece(start, keys, values)

    def key_norms(self, start: int, end: int) -> Tensor:
        """L2 norms of the keys at positions `start` to `end`, `[kv_heads, end - start]` float32."""
        parts = [extent.buffer.norms(extent.tokens) for extent in self.extents]
        norms = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return norms[:, start:end]

    def _with_room(self, keys: Tensor, values: Tensor, new: int, fresh_tokens: int = 0) -> Extent:
        """The extent that takes the next `new` tokens, of the heads and sizes of `keys`."""
        extent = self._writable_extent(keys, values, max(new, fresh_tokens))
        buffer = extent.buffer
        if extent.tokens + new > buffer.capacity:
            growth = max(buffer.capacity // 8, MINIMUM_GROWTH_TOKENS)
            capacity = max(buffer.capacity + growth, extent.tokens + new)
            extent.buffer = buffer.grown(capacity, extent.tokens)
            self.moves.count += 1
        return extent

    def _writable_extent(self, keys: Tensor, values: Tensor, capacity: int) -> Extent:
        last = self.extents[-1] if self.extents else None
        if last is not None and last.owned and last.tokens >= last.buffer.shared_tokens:
            return last
        if last is not None:
            # What stays visible of it is read by others too, so it is never written again.
            last.owned = False
        capacity = max(capacity, self.reserve_tokens)
        fresh = Extent(Buffer(_empty(keys, capacity), _empty(values, capacity)), 0, owned=True)
        self.extents.append(fresh)
        self.moves.count += 1
        return fresh


def _empty(like: Tensor, capacity: int) -> Tensor:
    heads, _, dim = like.shape
    return torch.empty(heads, capacity, dim, dtype=like.dtype, device=like.device)
