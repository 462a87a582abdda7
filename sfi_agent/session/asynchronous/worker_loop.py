"""Threads beside the caller's: for one function, and for an event loop.

All of them are daemons, and none is waited for without an end: a function that hangs holds up
neither a session nor the end of the program.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "GRACE_SECONDS",
    "Outcome",
    "WorkerLoop",
    "in_thread",
    "outcome_of",
    "run_in_thread",
    "wait_elsewhere",
]

GRACE_SECONDS = 0.25
"""What is cancelled may take so long to clean up before nobody waits for it any more."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a function: its value, or what it raised."""

    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        """The value; raises what was raised."""
        if self.error is not None:
            raise self.error
        return self.value


def run_in_thread(
    function: Callable[[], Any], done: Callable[[Outcome], None], name: str
) -> threading.Thread:
    """Call a function in a thread of its own, in the caller's context.

    Args:
        function: Whatever it raises goes into the outcome.
        done: Told the outcome, in that thread.
        name: Of the thread.
    """
    context = copy_context()

    def work() -> None:
        try:
            outcome = Outcome(context.run(function))
        except BaseException as error:
            outcome = Outcome(error=error)
        done(outcome)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


async def in_thread(function: Callable[[], Any], name: str) -> Outcome:
    """What becomes of a function that is called in a thread of its own.

    Cancelling the wait leaves the thread alone and drops what comes of it.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[Outcome] = loop.create_future()

    def deliver(outcome: Outcome) -> None:
        if not arrived.done():
            arrived.set_result(outcome)

    def done(outcome: Outcome) -> None:
        try:
            loop.call_soon_threadsafe(deliver, outcome)
        except RuntimeError:
            pass  # The loop is closed: nobody waits any more.

    run_in_thread(function, done, name)
    return await arrived


class WorkerLoop:
    """An event loop in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine in the loop, in the caller's context."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End what still runs, the loop and its thread; the thread itself may call it, in which
        garbage collection happens as well."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(4 * GRACE_SECONDS)

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=GRACE_SECONDS))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


def wait_elsewhere(awaitable: Awaitable[T]) -> T:
    """Wait for something in an event loop of its own, whatever runs in this thread."""
    loop = WorkerLoop("sfi-agent-await")
    try:
        value: T = loop.submit(outcome_of(awaitable)).result().get()
        return value
    finally:
        loop.close()


async def outcome_of(awaitable: Awaitable[Any]) -> Outcome:
    """What becomes of something that is awaited; nothing is raised."""
    try:
        return Outcome(await awaitable)
    except BaseException as error:
        # Loops let KeyboardInterrupt and SystemExit out of `run_forever`, in a thread where
        # nobody sees them.
        return Outcome(error=error)
