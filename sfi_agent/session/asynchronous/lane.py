"""One asynchronous call on the engine's thread: its turns, who reads them, and how they end."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from sfi_agent.engine.requests import BlockStep, DenseStep, FastStep, RefreshStep, StepRequest
from sfi_agent.engine.runner import Runner
from sfi_agent.session.asynchronous.channel import Channel, Ended, ReaderGone
from sfi_agent.session.asynchronous.shared_steps import may_share
from sfi_agent.session.asynchronous.worker_loop import Outcome, run_in_thread
from sfi_agent.session.events import Event, TurnEnd
from sfi_agent.session.ownership import Lease
from sfi_agent.session.tool_use.tool_round import ToolRound
from sfi_agent.session.turn_moves import Errand, TurnMove, TurnMoves

__all__ = ["Lane"]


class Lane:
    """The turns of one call. Only the engine's thread touches them; others post what they want.

    Args:
        moves: The turns, not begun.
        lease: Released when they are over.
        runner: Executes the steps.
        loop: Where the reader lives.
        ends_only: Whether the reader wants to hear of the ends of turns alone.
        shares_steps: Whether steps may be executed together with those of other sessions: not
            where code from elsewhere, which may raise, runs inside them.
        takes_blocks: Whether the policy makes blocks of segments, so that others' blocks may wait
            for those.
        note_failure: Told the error because of which the turns are about to be closed.

    Attributes:
        channel: Events, rounds of tools, and at last `Ended`.
        loop: Where the reader lives.
        ended: Done when the turns are over and the session is free.
        request: What the turns wait for; None while they do not wait for a step.
        asked_at: The tick at which they began to wait.
        tools: Runs the tools of the last round; kept here so that it is kept at all.
    """

    def __init__(
        self,
        moves: TurnMoves[None],
        lease: Lease,
        runner: Runner,
        loop: asyncio.AbstractEventLoop,
        *,
        ends_only: bool,
        shares_steps: bool,
        takes_blocks: bool,
        note_failure: Callable[[BaseException], None],
    ) -> None:
        self.runner = runner
        self.loop = loop
        self.channel = Channel()
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        # Nobody who waits for it can cancel it.
        self.ended.set_running_or_notify_cancel()
        self.request: StepRequest | None = None
        self.asked_at = 0
        self.takes_blocks = takes_blocks
        self.tools: asyncio.Task[None] | None = None
        self.post: Callable[[str, Any], None] = lambda kind, value: None
        self._moves = moves
        self._lease = lease
        self._ends_only = ends_only
        self._shares_steps = shares_steps
        self._note_failure = note_failure
        self._context = copy_context()
        lease.is_left = self._is_left

    # What others may call, from any thread; `abandon` takes no lock, garbage collection calls it.

    def resume(self, answer: Any = None) -> None:
        """Go on with what the turns asked for."""
        self.post("resume", answer)

    def fail(self, error: BaseException) -> None:
        """End the turns with an error for their reader."""
        self.post("end", error)

    def abandon(self) -> None:
        """End the turns: nobody reads them any more."""
        self._lease.leave()
        self.post("end", None)

    def tell(self, event: Event) -> None:
        """Pass an event to the reader from outside of the turns."""
        if not self._ends_only:
            try:
                self.channel.put(event)
            except ReaderGone:
                self.abandon()

    @property
    def going_on(self) -> bool:
        """Whether somebody still waits for the turns."""
        return not (self.ended.done() or self._lease.leaving)

    # What the engine's thread calls.

    @property
    def shares_step(self) -> bool:
        """Whether the step that is waited for may be executed together with others."""
        safe = self._shares_steps and not self.runner.check_numbers
        return safe and self.request is not None and may_share(self.request)

    def advance(self, answer: Any, tick: int) -> None:
        """Take the turns to the next place where they wait, or to their end."""
        self.request, self.asked_at = None, tick
        try:
            while not self._waits_with(self._context.run(self._moves.send, answer)):
                answer = None
        except StopIteration:
            self.end(None)
        except ReaderGone:
            self.end(None)
        except BaseException as error:
            self.end(error)

    def end(self, error: BaseException | None) -> None:
        """The turns are over: free the session, and tell the reader."""
        if self.ended.done():
            return
        self.request = None
        if error is not None:
            self._note_failure(error)
        try:
            self._context.run(self._moves.close)
        except BaseException as failure:
            error = error or failure
        self._lease.release()
        self._lease.is_left = lambda: False
        self.post = lambda kind, value: None
        self.ended.set_result(None)
        try:
            self.channel.put(Ended(error))
        except ReaderGone:
            pass

    def _waits_with(self, move: TurnMove) -> bool:
        if isinstance(move, (DenseStep, FastStep, BlockStep, RefreshStep)):
            self.request = move
            return True
        if isinstance(move, Errand):
            self._context.run(run_in_thread, move.work, self._done, "sfi-agent-plan")
            return True
        if isinstance(move, ToolRound):
            self.channel.put(move)
            return True
        if self._ends_only and not isinstance(move, TurnEnd):
            return False
        return self.channel.put(move, bounded=not self._ends_only)

    def _done(self, outcome: Outcome) -> None:
        if outcome.error is None:
            self.resume(outcome.value)
        else:
            self.fail(outcome.error)

    def _is_left(self) -> bool:
        """Whether the reader's loop is closed, which nobody tells the lane; then it ends."""
        if self.loop.is_closed():
            self.abandon()
        return self.loop.is_closed()
