"""One connection to an MCP server, held open by an event loop in a thread of its own.

The client must be entered and left by one task, and callers come from any loop. So a daemon
thread (`_Link`) owns the client for its whole life, and callers hand it coroutines. It does not
know the `Connection` that callers hold: when nobody holds that any more, the link is told to end.
What is open when the program ends is ended then.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import math
import threading
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from sfi_agent.errors import ToolServerError, explain
from sfi_agent.observe.log import log_event

__all__ = ["ClientPlan", "Connection", "reason_of"]

_CLOSE_SECONDS = 15.0
"""A server process is asked to end, then told, then killed: clients take up to 7 s for that."""

_Result = TypeVar("_Result")
_Work = Callable[[Any], Coroutine[Any, Any, _Result]]


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """What a connection does; all of it runs in the background thread.

    Attributes:
        name: Names the server in messages.
        client: Makes the client.
        prepare: Runs once the client is open; what it returns is the result of `open`.
        watch: Runs beside the calls until the connection ends.
        details: What else is known when the server could not be started; "" for nothing.
    """

    name: str
    client: Callable[[], AbstractAsyncContextManager[Any]]
    prepare: _Work[Any]
    watch: _Work[None]
    details: Callable[[], str]


class Connection:
    """A client that is kept open in the background; opened once and closed once."""

    def __init__(self, plan: ClientPlan) -> None:
        self._plan = plan
        self._link = _Link(plan)
        # Not at exit: `_end_all` also waits there.
        weakref.finalize(self, self._link.end).atexit = False

    def open(self, timeout_seconds: float) -> Any:
        """Connect, and wait for it.

        Raises:
            ToolServerError: The server could not be started or reached in time.
        """
        try:
            return self._link.start(timeout_seconds).result()
        except concurrent.futures.CancelledError:
            raise self._link.closed_error() from None
        except Exception as error:
            self.close()
            if isinstance(error, ToolServerError):
                raise
            got = reason_of(error) + self._plan.details()
            raise ToolServerError(explain(f"Connect to {self._plan.name}", got=got)) from error
        except BaseException:  # The caller was interrupted.
            self.close()
            raise

    async def call(self, work: _Work[_Result]) -> _Result:
        """Run a coroutine with the client, from any loop of asyncio; cancelling cancels it.

        Raises:
            ToolServerError: The connection is closed, or is closed meanwhile.
        """
        return await asyncio.wrap_future(self._link.submit(work))

    def end(self) -> None:
        """Begin to close; does not wait."""
        self._link.end()

    def close(self) -> None:
        """Close, and wait until thread and server process are gone; twice is fine.

        Raises:
            ToolServerError: A tool that cannot be stopped keeps the thread.
        """
        self._link.end()
        if not self._link.join(_CLOSE_SECONDS):
            raise ToolServerError(
                explain(
                    f"Close the connection to {self._plan.name}",
                    got=f"a tool that runs on after {_CLOSE_SECONDS:g} s and cannot be stopped",
                    remedy="The connection ends with that tool, or with the program",
                )
            )


class _Link:
    """The thread and its loop. Attributes without a lock belong to the loop."""

    def __init__(self, plan: ClientPlan) -> None:
        self._plan = plan
        self._opened: concurrent.futures.Future[Any] = concurrent.futures.Future()
        # Reentrant: garbage is collected anywhere, also while the lock is held, and calls `end`.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepts_calls = False
        self._lost: str | None = None
        self._stop: Callable[[], None] = lambda: None
        self._client: Any = None
        self._calls: set[asyncio.Task[Any]] = set()

    def start(self, timeout_seconds: float) -> concurrent.futures.Future[Any]:
        name = f"tools of {self._plan.name}"
        self._thread = threading.Thread(
            target=self._run, args=(timeout_seconds,), name=name, daemon=True
        )
        _LINKS.add(self)
        self._thread.start()
        return self._opened

    def submit(self, work: _Work[_Result]) -> concurrent.futures.Future[_Result]:
        # Scheduled under the lock: the loop runs what it has before it ends, see `_finish`.
        with self._lock:
            if self._loop is None or not self._accepts_calls:
                raise self.closed_error()
            return asyncio.run_coroutine_threadsafe(self._call(work), self._loop)

    def end(self) -> None:
        with self._lock:
            self._accepts_calls = False
            if self._loop is None:
                self._opened.cancel()
            else:
                self._loop.call_soon_threadsafe(self._stop)

    def join(self, timeout_seconds: float) -> bool:
        """Wait for the thread; whether it is gone."""
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def closed_error(self) -> ToolServerError:
        got = "a connection that is closed" if self._lost is None else "a lost connection"
        if self._lost:
            got += f" ({self._lost})"
        return ToolServerError(explain(f"Call a tool of {self._plan.name}", got=got))

    def _run(self, timeout_seconds: float) -> None:
        try:
            asyncio.run(self._live(timeout_seconds))
        except BaseException as error:
            if self._opened.done():
                self._lost = reason_of(error)
                log_event("warning", "tool_server_lost", server=self._plan.name, reason=self._lost)
            else:
                self._opened.set_exception(error)
        finally:
            _LINKS.discard(self)

    async def _live(self, timeout_seconds: float) -> None:
        try:
            await self._hold(timeout_seconds)
        finally:
            with self._lock:
                self._loop = None

    async def _hold(self, timeout_seconds: float) -> None:
        """Keep the client open from the first answer until the end is asked for."""
        import anyio

        stopping, plan = asyncio.Event(), self._plan
        # Everything lies inside the scope: it may be left only after what was entered in it.
        with anyio.CancelScope(deadline=anyio.current_time() + timeout_seconds) as scope:
            with self._lock:
                if not self._opened.set_running_or_notify_cancel():
                    return
                self._loop, self._stop = asyncio.get_running_loop(), scope.cancel
            async with plan.client() as client:
                ready = await plan.prepare(client)
                scope.deadline = math.inf
                watch = asyncio.create_task(plan.watch(client))
                with self._lock:
                    self._client, self._stop, self._accepts_calls = client, stopping.set, True
                self._opened.set_result(ready)
                try:
                    await stopping.wait()
                finally:
                    if not stopping.is_set():
                        self._lost = ""  # What broke it is known once the client is left.
                    with anyio.CancelScope(shield=True):
                        await self._finish(watch)
        if not self._opened.done():
            late = anyio.current_time() >= scope.deadline
            got = f"no answer within {timeout_seconds:g} s" if late else "a close meanwhile"
            raise ToolServerError(explain(f"Connect to {plan.name}", got=got + plan.details()))

    async def _call(self, work: _Work[_Result]) -> _Result:
        task = asyncio.current_task()
        assert task is not None
        if self._client is None:
            raise self.closed_error()
        self._calls.add(task)
        try:
            return await work(self._client)
        except asyncio.CancelledError:
            if self._client is None:  # Not the caller has cancelled it: `_finish` has.
                raise self.closed_error() from None
            raise
        finally:
            self._calls.discard(task)

    async def _finish(self, watch: asyncio.Task[None]) -> None:
        """End every call, those that were only just submitted included."""
        with self._lock:
            self._accepts_calls = False
        await asyncio.sleep(0)  # Submitted calls become tasks,
        await asyncio.sleep(0)  # which begin.
        self._client = None
        ending = [watch, *self._calls]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)


def reason_of(error: BaseException) -> str:
    """Kind and message of an error, of the first one where it is a group of them."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    message = str(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


_LINKS: weakref.WeakSet[_Link] = weakref.WeakSet()


def _end_all() -> None:
    """At exit: no server process stays behind."""
    links = list(_LINKS)
    for link in links:
        link.end()
    for link in links:
        link.join(_CLOSE_SECONDS)


atexit.register(_end_all)
