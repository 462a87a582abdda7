"""Driving turns in the caller's own thread."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any

from sfi_agent.engine.decoder import DecodeMoves
from sfi_agent.engine.requests import BlockStep, DenseStep, FastStep, RefreshStep, StepOutcome
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.asynchronous.prefill_pieces import execute_alone
from sfi_agent.session.asynchronous.worker_loop import WorkerLoop, outcome_of
from sfi_agent.session.events import Event, ToolCall
from sfi_agent.session.tool_use.tool_round import ToolRound
from sfi_agent.session.tool_use.tool_running import Approve, ToolHost, run_round
from sfi_agent.session.turn_moves import Errand, TurnMoves

__all__ = ["decode_here", "drive_here"]


def decode_here(runner: Runner, moves: DecodeMoves) -> None:
    """Run a decoding to its end."""
    outcome: StepOutcome | None = None
    try:
        while True:
            move = moves.send(outcome)
            outcome = None if isinstance(move, StepRecord) else execute_alone(runner, move)
    except StopIteration:
        return
    finally:
        moves.close()


def drive_here(
    moves: TurnMoves[None], runner: Runner, host: ToolHost, approve: Approve | None
) -> Generator[Event, None, None]:
    """The events of turns: steps are executed in this thread, tools beside it.

    Args:
        moves: The turns.
        runner: Executes the steps.
        host: Whose tools are run.
        approve: Asked in this thread before a tool runs; None lets all run.
    """
    tools = _ToolsHere(host, approve)
    answer: Any = None
    try:
        while True:
            try:
                move = moves.send(answer)
            except StopIteration:
                return
            answer = None
            if isinstance(move, (DenseStep, FastStep, BlockStep, RefreshStep)):
                answer = execute_alone(runner, move)
            elif isinstance(move, Errand):
                answer = move.work()
            elif isinstance(move, ToolRound):
                yield from tools.run(move)
            else:
                yield move
    except BaseException as error:
        host.spans.note_failure(error)
        raise
    finally:
        moves.close()
        tools.close()


@dataclass(frozen=True, slots=True)
class _Question:
    """Whether a call may run, for the thread that waits."""

    call: ToolCall
    answer: Callable[[Any], None]


class _Over:
    """The round is over."""


class _ToolsHere:
    """Tools of calls that wait in their own thread: they run in a loop in another thread."""

    def __init__(self, host: ToolHost, approve: Approve | None) -> None:
        self._host = host
        self._approve = approve
        self._loop: WorkerLoop | None = None

    def run(self, work: ToolRound) -> Generator[Event, None, None]:
        """Run a round; events as they happen."""
        if self._loop is None:
            self._loop = WorkerLoop("sfi-agent-tools")
        arrived: queue.SimpleQueue[Event | _Question | _Over] = queue.SimpleQueue()

        async def ask(call: ToolCall) -> Any:
            loop = asyncio.get_running_loop()
            answered: asyncio.Future[Any] = loop.create_future()

            def deliver(value: Any) -> None:
                if not answered.done():
                    answered.set_result(value)

            def answer(value: Any) -> None:
                loop.call_soon_threadsafe(deliver, value)

            arrived.put(_Question(call, answer))
            value = await answered
            return await value if isinstance(value, Awaitable) else value

        asked = ask if self._approve is not None else None
        running = self._loop.submit(outcome_of(run_round(work, self._host, arrived.put, asked)))
        running.add_done_callback(lambda _: arrived.put(_Over()))
        try:
            while not isinstance(item := arrived.get(), _Over):
                if isinstance(item, _Question):
                    assert self._approve is not None
                    item.answer(self._approve(item.call))
                else:
                    yield item
            running.result().get()
        finally:
            work.close()

    def close(self) -> None:
        """End the loop and what runs in it."""
        if self._loop is not None:
            self._loop.close()
