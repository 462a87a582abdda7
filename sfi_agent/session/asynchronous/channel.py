"""Events on their way from the engine's thread to a reader in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["UNDELIVERED_EVENTS", "Channel", "Ended", "ReaderGone"]

UNDELIVERED_EVENTS = 64
"""A turn pauses when so many of its events wait for their reader, and goes on at half of them."""


class ReaderGone(Exception):
    """The reader's event loop is closed. Internal: the turn ends."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last item: nothing follows, for this reason if there is one."""

    error: BaseException | None


class Channel:
    """A queue with any number of writers and one reader."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._paused = False
        self._lock = threading.Lock()

    def put(self, item: Any, *, bounded: bool = False) -> bool:
        """Append an item.

        Args:
            item: Anything.
            bounded: Whether the writer can pause.

        Returns:
            Whether the writer has to pause until there is room (see `get`); false unless
            `bounded`.

        Raises:
            ReaderGone: Nobody will read it.
        """
        with self._lock:
            self._items.append(item)
            reader, self._reader = self._reader, None
            if bounded and len(self._items) >= UNDELIVERED_EVENTS:
                self._paused = True
            paused = bounded and self._paused
        if reader is not None:
            try:
                reader.get_loop().call_soon_threadsafe(_wake, reader)
            except RuntimeError as error:
                raise ReaderGone from error
        return paused

    async def get(self, on_drained: Callable[[], None]) -> Any:
        """The next item. A reader that is cancelled while it waits loses none.

        Args:
            on_drained: Called when a writer that had to pause may go on.
        """
        while True:
            with self._lock:
                if self._items:
                    item = self._items.popleft()
                    drained = self._paused and len(self._items) <= UNDELIVERED_EVENTS // 2
                    self._paused = self._paused and not drained
                    break
                waiting = self._reader = asyncio.get_running_loop().create_future()
            await waiting
        if drained:
            on_drained()
        return item


def _wake(reader: asyncio.Future[None]) -> None:
    if not reader.done():
        reader.set_result(None)
