"""Ctrl-C while a session works: end the turn, keep the session."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfi_agent.session.session import Session

__all__ = ["ctrl_c_cancels"]


@contextmanager
def ctrl_c_cancels(session: Session) -> Iterator[None]:
    """The first Ctrl-C cancels what the session does; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(_signal: int, _frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        session.cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
