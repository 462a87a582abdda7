"""Reading an asynchronous call from an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfi_agent.engine.runner import Runner
from sfi_agent.errors import SessionBusy, explain
from sfi_agent.session.asynchronous.channel import Ended
from sfi_agent.session.asynchronous.engine_thread import EngineThread
from sfi_agent.session.asynchronous.lane import Lane
from sfi_agent.session.asynchronous.worker_loop import GRACE_SECONDS
from sfi_agent.session.events import Event, ToolCall
from sfi_agent.session.ownership import Lease
from sfi_agent.session.requests import TurnRequest
from sfi_agent.session.tool_use.tool_round import ToolRound
from sfi_agent.session.tool_use.tool_running import Approve, ToolHost, run_round
from sfi_agent.session.turn_moves import TurnMoves

__all__ = ["AsyncCall", "EventStream"]


@dataclass(frozen=True, slots=True)
class AsyncCall:
    """What a stream needs to begin.

    Attributes:
        request: What was asked for.
        moves: Makes the turns, once the session is owned.
        host: Whose tools are run.
        runner: Executes steps.
        thread: Where they are executed.
        shares_steps: See `Lane`.
        takes_blocks: See `Lane`.
        ends_only: See `Lane`.
    """

    request: TurnRequest
    moves: Callable[[Lease], TurnMoves[None]]
    host: ToolHost
    runner: Runner
    thread: EngineThread
    shares_steps: bool
    takes_blocks: bool
    ends_only: bool


class EventStream:
    """Events of an asynchronous call, as `session.astream` gives them: for `async for`.

    Nothing happens before the first event is asked for. The turn runs ahead of its reader by a
    bounded number of events (64) and then waits for it; tools begin when the reader has come to
    them. `aclose()`, a cancelled reader and a stream that is dropped end the turn, and what was
    generated stays part of the session.
    """

    def __init__(self, call: AsyncCall) -> None:
        self._call = call
        self._lane: Lane | None = None
        self._over = False
        self._reading = False
        self._left: weakref.finalize[[], EventStream] | None = None

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            SessionBusy: Another call on the session is under way, or another task reads the stream.
            SfiError: As `session.stream`.
        """
        if self._over:
            raise StopAsyncIteration
        if self._reading:
            raise SessionBusy(
                explain("read an event stream", got="another task that reads it", allowed="one")
            )
        self._reading = True
        try:
            return await self._next(self._lane or await self._begin())
        except (Exception, GeneratorExit):
            self._leave()
            raise
        except BaseException:
            # Cancelled: the session is free and at rest when the task has ended.
            await self._left_behind(self._leave())
            raise
        finally:
            self._reading = False

    async def aclose(self) -> None:
        """End the turn and wait until the session is free; twice is fine."""
        await self._left_behind(self._leave())

    def close_and_wait(self, timeout_seconds: float) -> None:
        """As `aclose`, blocking; not on the engine's thread.

        Raises:
            SessionBusy: The step under way takes longer; the turn ends with it.
        """
        lane = self._leave()
        if lane is not None:
            try:
                lane.ended.result(timeout_seconds)
            except concurrent.futures.TimeoutError as error:
                raise SessionBusy(
                    explain(
                        "closed a session",
                        got=f"a step that takes longer than {timeout_seconds:g} seconds",
                        remedy="close it again later",
                    )
                ) from error

    async def _begin(self) -> Lane:
        call = self._call
        lease = await call.host.ownership.take_async(call.request.action)
        try:
            call.host.cancellation.clear(call.request.timeout_seconds)
            lane = Lane(
                call.moves(lease),
                lease,
                call.runner,
                asyncio.get_running_loop(),
                ends_only=call.ends_only,
                shares_steps=call.shares_steps,
                takes_blocks=call.takes_blocks,
                note_failure=call.host.spans.note_failure,
            )
            call.thread.add(lane)
        except BaseException:
            lease.release()
            raise
        self._lane = lane
        self._left = weakref.finalize(self, lane.abandon)
        self._left.atexit = False
        return lane

    async def _next(self, lane: Lane) -> Event:
        lane.loop = asyncio.get_running_loop()
        while True:
            item = await lane.channel.get(lane.resume)
            if isinstance(item, ToolRound):
                work = _run_tools(item, self._call.host, lane, self._call.request.approve)
                # Loops hold their tasks only weakly.
                lane.tools = lane.loop.create_task(work)
            elif isinstance(item, Ended):
                self._leave()
                if isinstance(item.error, StopAsyncIteration):
                    # As it is, it would look like the end of the stream.
                    raise RuntimeError("the turn raised StopAsyncIteration") from item.error
                if item.error is not None:
                    raise item.error
                raise StopAsyncIteration
            else:
                event: Event = item
                return event

    def _leave(self) -> Lane | None:
        """Read no more. The lane, which ends by itself; None where there is none."""
        self._over = True
        if self._left is not None:
            self._left()
        return self._lane

    @staticmethod
    async def _left_behind(lane: Lane | None) -> None:
        if lane is None:
            return
        await asyncio.shield(asyncio.wrap_future(lane.ended))
        tools = lane.tools
        if tools is not None and tools.get_loop() is asyncio.get_running_loop():
            # They have been cancelled; those that hold on to their lives are left behind.
            await asyncio.wait({tools}, timeout=2 * GRACE_SECONDS)


async def _run_tools(work: ToolRound, host: ToolHost, lane: Lane, approve: Approve | None) -> None:
    async def ask(call: ToolCall) -> Any:
        assert approve is not None
        answer = approve(call)
        return await answer if inspect.isawaitable(answer) else answer

    try:
        await run_round(work, host, lane.tell, ask if approve is not None else None)
    except asyncio.CancelledError:
        # Somebody cancelled all tasks of the loop: the call ends as if it had been asked to.
        if lane.going_on:
            host.cancellation.set()
            lane.resume()
        raise
    except BaseException as error:
        lane.fail(error)
    else:
        lane.resume()
