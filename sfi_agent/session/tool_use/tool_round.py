"""The calls of one turn while they are run: what began, what came of it, and whether anybody still
wants to know."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sfi_agent.session.events import ToolCall, ToolResult
from sfi_agent.session.tool_use.tools import failed_call

__all__ = ["ToolRound"]


class ToolRound:
    """A turn asks for its calls to be run by yielding one of these.

    Results may come from any thread. When the round is closed, what still runs counts as not
    finished, and what comes of it later is dropped.

    Args:
        calls: Calls of one turn.
        note: Told every result, so that it is part of the conversation whatever happens next.
    """

    def __init__(self, calls: Sequence[ToolCall], note: Callable[[ToolResult], None]) -> None:
        self.calls = tuple(calls)
        self._note = note
        self._running: dict[str, ToolCall] = {}
        self._results: dict[str, ToolResult] = {}
        self._closed = False
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    @property
    def results(self) -> list[ToolResult]:
        """Results so far, in the order of the calls."""
        return [self._results[call.id] for call in self.calls if call.id in self._results]

    def start(self, call: ToolCall) -> bool:
        """A call is about to run; false if it must not any more."""
        with self._lock:
            if not self._closed:
                self._running[call.id] = call
            return not self._closed

    def finish(self, result: ToolResult) -> bool:
        """A call has a result; false if nobody wants it any more."""
        with self._lock:
            if self._closed:
                return False
            self._running.pop(result.call_id, None)
            self._results[result.call_id] = result
            self._note(result)
            return True

    def close(self) -> list[ToolResult]:
        """Want nothing more. What still ran is answered, with these results; twice is fine."""
        with self._lock:
            unfinished = [
                failed_call(
                    call,
                    f"{call.name} was cancelled before it finished; what it did until then is not "
                    "known.",
                )
                for call in self._running.values()
            ]
            for result in unfinished:
                self.finish(result)
            self._closed = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
        return unfinished

    @contextmanager
    def telling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call somebody who runs the calls when the round is closed, in the thread that does."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)
