"""The thread that takes the steps of all asynchronous calls of one engine.

Its turning wheel: take what was posted, execute one step of everybody who waits for one, together
where that is possible, then one piece of one prefill. So sessions join and leave between steps, and
a long prefill costs the others one chunk per token, not its whole length.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

from sfi_agent.engine.batch import chosen_lanes
from sfi_agent.engine.requests import DenseStep
from sfi_agent.errors import SessionStateError, explain
from sfi_agent.session.asynchronous.lane import Lane
from sfi_agent.session.asynchronous.prefill_pieces import is_prefill, process_piece
from sfi_agent.session.asynchronous.shared_steps import execute_shared

__all__ = ["EngineThread"]

_EXIT_SECONDS = 5.0

_Message: TypeAlias = "tuple[str, Lane | None, Any]"


class EngineThread:
    """Starts with the first lane; ends when it is closed, or with the last reference to it."""

    def __init__(self) -> None:
        # Reentrant and without a lock of ours: garbage collection posts as well.
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.RLock()
        weakref.finalize(self, self._inbox.put, ("stop", None, None)).atexit = False

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread: then it cannot wait for what the thread does."""
        return threading.current_thread() is self._thread

    def add(self, lane: Lane) -> None:
        """Take a lane's steps from now on.

        Raises:
            SessionStateError: The engine is closed.
        """
        inbox, own = self._inbox, weakref.ref(lane)

        def post(kind: str, value: Any) -> None:
            present = own()
            if present is not None:
                inbox.put((kind, present, value))

        with self._lock:
            self.require_open("made an asynchronous call")
            if self._thread is None:
                wheel = _Wheel(self._inbox)
                self._thread = threading.Thread(
                    target=wheel.run, name="sfi-agent-engine", daemon=True
                )
                self._thread.start()
                _THREADS.add(self)
            lane.post = post
            inbox.put(("add", lane, None))

    def require_open(self, attempted: str) -> None:
        """Refuse what a closed engine does not do.

        Raises:
            SessionStateError: The engine is closed.
        """
        if self._closed:
            raise SessionStateError(
                explain(f"{attempted} on an engine that is closed", remedy="make another Engine")
            )

    def close(self, timeout_seconds: float | None = None) -> None:
        """End the lanes and the thread, and wait for it; twice is fine."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._inbox.put(("stop", None, None))
        if thread is not None and not self.is_current:
            thread.join(timeout_seconds)


class _Wheel:
    """What the thread does. It knows the lanes, and nobody else does."""

    def __init__(self, inbox: queue.SimpleQueue[_Message]) -> None:
        self._inbox = inbox
        self._lanes: list[Lane] = []
        self._tick = 0

    def run(self) -> None:
        """Turn until told to stop."""
        while self._take_messages():
            self._lanes = [lane for lane in self._lanes if not lane.ended.done()]
            self._turn()
            self._lanes = [lane for lane in self._lanes if not lane.ended.done()]

    def _take_messages(self) -> bool:
        """Do what was posted, waiting for something if there is no step to take."""
        wait = not any(lane.request is not None for lane in self._lanes)
        while True:
            try:
                kind, lane, value = self._inbox.get(wait)
            except queue.Empty:
                return True
            if lane is None:
                self._stop()
                return False
            if kind == "add":
                self._lanes.append(lane)
                lane.advance(None, self._tick)
            elif lane.ended.done():
                pass
            elif kind == "resume":
                lane.advance(value, self._tick)
            else:
                lane.end(value)
            # Waiting must not keep anybody's session alive.
            del lane, value
            wait = False

    def _turn(self) -> None:
        self._tick += 1
        waiting = [lane for lane in self._lanes if lane.request is not None]
        prefills = [lane for lane in waiting if lane.request and is_prefill(lane.request)]
        steps = [lane for lane in waiting if lane not in prefills]
        if steps:
            chosen = chosen_lanes(steps, self._tick)
            together = [lane for lane in chosen if lane.shares_step]
            alone = [[lane] for lane in chosen if lane not in together]
            for group in ([together] if together else []) + alone:
                self._step(group, len(waiting) - len(group))
        if prefills:
            self._prefill(min(prefills, key=lambda lane: lane.asked_at))

    def _step(self, group: Sequence[Lane], waiting: int) -> None:
        """Execute a step of each in one go. What one of them raises ends that one."""
        requests = [lane.request for lane in group if lane.request is not None]
        try:
            results = execute_shared(group[0].runner, requests, len(self._lanes), waiting)
        except BaseException as error:
            for lane in group:
                lane.end(error)
            return
        for lane, result in zip(group, results, strict=True):
            if isinstance(result, BaseException):
                lane.end(result)
            else:
                lane.advance(result, self._tick)

    def _prefill(self, lane: Lane) -> None:
        assert isinstance(lane.request, DenseStep)
        try:
            left = process_piece(lane.runner, lane.request)
        except BaseException as error:
            lane.end(error)
            return
        if isinstance(left, DenseStep):
            lane.request, lane.asked_at = left, self._tick
        else:
            lane.advance(left, self._tick)

    def _stop(self) -> None:
        for lane in self._lanes:
            lane.end(SessionStateError(explain("went on with a call", got="a closed engine")))
        self._lanes = []


_THREADS: weakref.WeakSet[EngineThread] = weakref.WeakSet()


def _end_all() -> None:
    """At exit no thread may be inside of a step while the libraries below it are taken down."""
    for thread in list(_THREADS):
        thread.close(_EXIT_SECONDS)


atexit.register(_end_all)
