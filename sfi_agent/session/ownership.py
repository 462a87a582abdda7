"""One owner at a time: a second thread gets `SessionBusy` instead of a race."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sfi_agent.errors import SessionBusy, explain

__all__ = ["Ownership"]


class Ownership:
    """A lock that never waits and can name who holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder = ""

    @contextmanager
    def held_for(self, action: str) -> Iterator[None]:
        """Own the session for the length of a with block.

        Args:
            action: What is being done, for the message the other one gets.

        Raises:
            SessionBusy: Somebody owns it already.
        """
        if not self._lock.acquire(blocking=False):
            raise SessionBusy(
                explain(
                    f"called session.{action}() while the session is busy",
                    got=f"session.{self._holder}() still under way",
                    allowed="one call at a time per session",
                    remedy="wait for it, or finish or close the running stream; a fork made "
                    "before can work beside it",
                )
            )
        self._holder = action
        try:
            yield
        finally:
            self._lock.release()
