"""What sessions hold in memory, counted from outside."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent import Session

__all__ = ["BufferUse", "MemoryWatch", "buffers_of"]

_GROWTH_TOKENS = 1024
"""A buffer grows by an eighth, and by at least so many tokens."""
_OPEN_SEGMENT_TOKENS = 64
"""More than any call adds to a history and takes back again before it returns."""


@dataclass(frozen=True, slots=True)
class BufferUse:
    """What one layer of a session reads of one buffer.

    Attributes:
        buffer: Keys and values.
        tokens: How many of its first tokens the session sees.
        owned: Whether the session writes to it.
    """

    buffer: Any
    tokens: int
    owned: bool


def buffers_of(session: Session) -> Iterator[BufferUse]:
    """Every buffer that an open session reads, wherever it is."""
    sequence = session._core.sequence
    assert sequence is not None
    for layer in sequence.layers:
        for extent in layer.history.extents:
            yield BufferUse(extent.buffer, extent.tokens, extent.owned)


class MemoryWatch:
    """Holds the live sessions to what their ids need."""

    def __init__(self) -> None:
        self._highest: dict[int, tuple[weakref.ref[Any], int]] = {}

    def note(self, session: Session, at_least: int = 0) -> None:
        """Remember how much the buffers of a session hold.

        Args:
            session: Open.
            at_least: Tokens that they may have held before.
        """
        for use in buffers_of(session):
            reference, tokens = self._highest.get(id(use.buffer), (weakref.ref(use.buffer), 0))
            if reference() is not use.buffer:
                reference, tokens = weakref.ref(use.buffer), 0
            self._highest[id(use.buffer)] = reference, max(tokens, use.tokens, at_least)

    def check(self, sessions: Sequence[Session]) -> None:
        """Buffers are as large as what they held at most, and every one has at most one writer.

        Args:
            sessions: All that are alive, open; `note` has seen them.
        """
        seen: dict[int, Any] = {}
        writers: dict[int, int] = {}
        for session in sessions:
            owned_bytes = 0
            for use in buffers_of(session):
                key = id(use.buffer)
                seen[key] = use.buffer
                owned_bytes += use.buffer.nbytes * use.owned
                writers[key] = writers.get(key, 0) + use.owned
            assert session.stats.history_bytes == owned_bytes
            check_fast_memory(session)
        assert max(writers.values(), default=0) <= 1, "two sessions write to one buffer"
        self._highest = {key: self._highest[key] for key in seen}
        for key, buffer in seen.items():
            held = self._highest[key][1] + _OPEN_SEGMENT_TOKENS
            most = held + max(held // 8, _GROWTH_TOKENS)
            assert buffer.capacity <= most, f"room for {buffer.capacity}, {held} were held"
        counted = sum(session.stats.history_bytes for session in sessions)
        unowned = sum(buffer.nbytes for key, buffer in seen.items() if not writers[key])
        assert counted + unowned == sum(buffer.nbytes for buffer in seen.values())


def check_fast_memory(session: Session) -> None:
    """The memory of fast steps does not grow beyond its budget."""
    settings, segment = session.config.memory, session.config.refresh.max_segment_tokens
    tokens = settings.sink_tokens + settings.selected_tokens + settings.recent_tokens
    sequence = session._core.sequence
    assert sequence is not None
    for layer in sequence.layers:
        if layer.memory is not None and layer.memory.keys.ndim == 3:
            # Below its budget it grows in steps.
            assert layer.memory.keys.shape[1] <= tokens + segment + 1 + 2 * 256
