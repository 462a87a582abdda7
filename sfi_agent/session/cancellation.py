"""Ending a call before it is done: asked for by somebody, or because its time is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sfi_agent.session.reply import CancelledBy

__all__ = ["Cancellation"]


class Cancellation:
    """What the calls of one session ask whether to go on. Any thread may set it."""

    def __init__(self) -> None:
        self._by: CancelledBy | None = None
        self._deadline: float | None = None
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    def clear(self, timeout_seconds: float | None = None) -> None:
        """A call begins: forget what ended an earlier one.

        Args:
            timeout_seconds: Time for the call from now on; None sets no limit.
        """
        self._by = None
        self._deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds

    def set(self) -> None:
        """End the present call."""
        with self._lock:
            if not self.is_set():
                self._by = "caller"
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def is_set(self) -> bool:
        """Whether the present call is to end."""
        return self.by is not None

    @property
    def by(self) -> CancelledBy | None:
        """What ends the present call; None while nothing does."""
        if self._by is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._by = "timeout"
        return self._by

    @property
    def remaining_seconds(self) -> float | None:
        """Time left for the present call, at least 0; None without a limit."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call somebody who waits when `set` is called, in the thread that calls it."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)
