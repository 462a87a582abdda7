"""Running the calls of a turn in an event loop: asked about first, then side by side, with limits.

Sync functions run in threads of their own, async ones in the loop. What takes too long, or is not
wanted any more, is cancelled where it can be and abandoned where it cannot.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sfi_agent.errors import InputError, explain
from sfi_agent.session.asynchronous.worker_loop import GRACE_SECONDS, Outcome, in_thread, outcome_of
from sfi_agent.session.cancellation import Cancellation
from sfi_agent.session.events import Event, ToolCall, ToolResult, ToolStart
from sfi_agent.session.ownership import Ownership
from sfi_agent.session.telemetry.session_spans import SessionSpans
from sfi_agent.session.tool_use.tool_round import ToolRound
from sfi_agent.session.tool_use.tool_schema import is_async
from sfi_agent.session.tool_use.tools import PreparedCall, ToolSet, failed_call

__all__ = ["Approve", "ToolHost", "run_round"]

Approve: TypeAlias = Callable[[ToolCall], "bool | str | Awaitable[bool | str]"]
"""Asked before a call is run: True lets it run, False or a text (the reason) refuses it."""

Ask: TypeAlias = Callable[[ToolCall], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class ToolHost:
    """Whose tools are run.

    Attributes:
        tools: The session's tools.
        timeout_seconds: Time for tools that name none; None sets no limit.
        cancellation: Ends the round.
        ownership: Knows what is called from inside a tool.
        spans: Of the call that the tools belong to.
    """

    tools: ToolSet
    timeout_seconds: float | None
    cancellation: Cancellation
    ownership: Ownership
    spans: SessionSpans


async def run_round(
    work: ToolRound, host: ToolHost, emit: Callable[[Event], None], ask: Ask | None
) -> None:
    """Run the calls of a round in this loop, and close it.

    Args:
        work: The calls.
        host: See `ToolHost`.
        emit: Told `ToolStart` and `ToolResult` as they happen.
        ask: Asks somebody about a call, see `Approve`; None lets all calls run.

    Raises:
        InputError: Something else than True, False or a text came as an answer.
        Exception: What `ask` raised; no tool has run then.
        BaseException: What a tool raised that is no Exception (KeyboardInterrupt, SystemExit).
    """
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def told() -> None:
        try:
            loop.call_soon_threadsafe(stop.set)
        except RuntimeError:
            pass  # The loop is closed, and the tools in it with it.

    with host.cancellation.telling(told), work.telling(told):
        running = _Running(work, host, emit, ask, stop)
        try:
            for group in _groups(await running.approved()):
                await running.run(group)
        except _Stopped:
            pass
        finally:
            for result in work.close():
                emit(result)


class _Stopped(Exception):
    """The round is to end."""


class _Running:
    """One round, under way."""

    def __init__(
        self,
        work: ToolRound,
        host: ToolHost,
        emit: Callable[[Event], None],
        ask: Ask | None,
        stop: asyncio.Event,
    ) -> None:
        self._work = work
        self._host = host
        self._emit = emit
        self._ask = ask
        self._stop = stop

    async def approved(self) -> list[PreparedCall]:
        """The calls that are to run; the others have their results then.

        All of them are asked about before any runs.
        """
        ready = []
        for call in self._work.calls:
            prepared = self._host.tools.prepare(call)
            if isinstance(prepared, PreparedCall):
                refusal = await self._refusal(call)
                if refusal is None:
                    ready.append(prepared)
                    continue
                prepared = refusal
            self._finish(prepared)
        return ready

    async def run(self, group: Sequence[PreparedCall]) -> None:
        """Run calls side by side until all have results."""
        loop = asyncio.get_running_loop()
        ends: dict[asyncio.Task[Outcome], float] = {}
        calls: dict[asyncio.Task[Outcome], PreparedCall] = {}
        late: set[asyncio.Task[Outcome]] = set()
        try:
            for prepared in group:
                if not self._work.start(prepared.call):
                    raise _Stopped
                self._emit(ToolStart(prepared.call))
                task = loop.create_task(self._watched(prepared))
                calls[task], ends[task] = prepared, loop.time() + self._limit_seconds(prepared)
            while calls:
                patience = min(ends[task] for task in calls) - loop.time()
                done = await self._wait(set(calls), None if math.isinf(patience) else patience)
                finished = [task for task in calls if task in done]
                self._settle([(calls.pop(task), task.result()) for task in finished])
                self._require_going_on()
                now = loop.time()
                for task in sorted((t for t in calls if now >= ends[t]), key=ends.__getitem__):
                    late.add(task)
                    self._finish(self._too_late(calls.pop(task)))
                    task.cancel()
        finally:
            left = {*calls, *late}
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=GRACE_SECONDS)

    async def _watched(self, prepared: PreparedCall) -> Outcome:
        with self._host.spans.tool(prepared.call) as span:
            outcome = await self._one(prepared)
            if outcome.error is not None:
                span.failed(outcome.error)
            elif isinstance(outcome.value, ToolResult):
                span.see(outcome.value)
            return outcome

    async def _one(self, prepared: PreparedCall) -> Outcome:
        self._host.ownership.enter_tool()
        try:
            if is_async(prepared.tool.function):
                started = Outcome(prepared.start())
            else:
                started = await in_thread(prepared.start, f"sfi-agent-tool-{prepared.call.name}")
            if started.error is not None or isinstance(started.value, ToolResult):
                return started
            return Outcome(prepared.gave(await started.value))
        except GeneratorExit:
            raise
        except BaseException as error:
            return Outcome(error=error)

    def _settle(self, finished: Sequence[tuple[PreparedCall, Outcome]]) -> None:
        """Take results; raises what is none, once the others are safe."""
        fatal: BaseException | None = None
        for prepared, outcome in finished:
            error = outcome.error
            if error is None:
                self._finish(outcome.value)
            elif isinstance(error, (Exception, asyncio.CancelledError)):
                self._finish(prepared.raised(error))
            else:
                fatal = fatal or error
        if fatal is not None:
            raise fatal

    async def _refusal(self, call: ToolCall) -> ToolResult | None:
        if self._ask is None:
            return None
        asking = asyncio.ensure_future(outcome_of(self._ask(call)))
        try:
            while not asking.done():
                await self._wait({asking}, None)
                self._require_going_on()
        finally:
            asking.cancel()
        answer = asking.result().get()
        if answer is True:
            return None
        if answer is not False and not isinstance(answer, str):
            raise InputError(
                explain(
                    f"asked whether {call.name} may run",
                    got=repr(answer),
                    allowed="True, or False or a text to refuse",
                )
            )
        reason = f": {answer}" if answer else "."
        return failed_call(call, f"{call.name} was not run, because it was refused{reason}")

    async def _wait(
        self, tasks: set[asyncio.Task[Outcome]], patience_seconds: float | None
    ) -> set[asyncio.Task[Outcome]]:
        """Those of the tasks that are done; none when the round is to end first."""
        left = self._host.cancellation.remaining_seconds
        times = [seconds for seconds in (patience_seconds, left) if seconds is not None]
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            done, _ = await asyncio.wait(
                {*tasks, stopped},
                timeout=max(0.0, min(times)) if times else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            stopped.cancel()
        return {task for task in tasks if task in done}

    def _require_going_on(self) -> None:
        if self._stop.is_set() or self._host.cancellation.is_set():
            raise _Stopped

    def _finish(self, result: ToolResult) -> None:
        if self._work.finish(result):
            self._emit(result)

    def _limit_seconds(self, prepared: PreparedCall) -> float:
        own, default = prepared.tool.timeout_seconds, self._host.timeout_seconds
        limit = default if own is None else own
        return math.inf if limit is None else limit

    def _too_late(self, prepared: PreparedCall) -> ToolResult:
        return failed_call(
            prepared.call,
            f"{prepared.call.name} was stopped after {self._limit_seconds(prepared):g} seconds, "
            "which is all it may take; what it did until then is not known.",
        )


def _groups(calls: Sequence[PreparedCall]) -> Iterator[list[PreparedCall]]:
    """Calls that may run side by side, in order; a call that may not is alone."""
    group: list[PreparedCall] = []
    for prepared in calls:
        if prepared.tool.parallel:
            group.append(prepared)
            continue
        if group:
            yield group
        yield [prepared]
        group = []
    if group:
        yield group
