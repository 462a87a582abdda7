"""A lock that threads get in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

__all__ = ["TurnLock"]


class TurnLock:
    """Reentrant, for `with`. It is handed over to whoever waits longest.

    The standard library's locks go to whoever asks next when they are free, and that is nearly
    always the thread that gave them back: one that takes step after step would keep the others
    waiting for its whole decoding.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._owner = 0
        self._depth = 0
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> TurnLock:
        own = threading.get_ident()
        with self._state:
            if self._owner in (0, own):
                self._owner = own
                self._depth += 1
                return self
            gate = threading.Lock()
            gate.acquire()
            turn = own, gate
            self._waiting.append(turn)
        try:
            gate.acquire()
        except BaseException:
            # Interrupted while it waited, or in the moment when it had got its turn.
            with self._state:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._hand_over()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._state:
            self._depth -= 1
            if not self._depth:
                self._hand_over()

    def _hand_over(self) -> None:
        self._owner, self._depth = 0, 0
        if self._waiting:
            self._owner, gate = self._waiting.popleft()
            self._depth = 1
            gate.release()
