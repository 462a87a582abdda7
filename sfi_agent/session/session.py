"""The Session: one conversation over one persistent history."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import SessionBusy, TemplateError, explain
from sfi_agent.plugins import load_plugins
from sfi_agent.registry import BUILT_IN
from sfi_agent.session.asynchronous.event_stream import AsyncCall, EventStream
from sfi_agent.session.chat import Chat, make_chat
from sfi_agent.session.driving import drive_here
from sfi_agent.session.events import Event, TurnEnd
from sfi_agent.session.overflow import OverflowPolicy, checked_policy, hook_is_asked
from sfi_agent.session.ownership import LONGEST_WAIT_SECONDS, Lease
from sfi_agent.session.reply import Reply, sum_replies
from sfi_agent.session.requests import TurnRequest
from sfi_agent.session.telemetry.session_spans import SessionSpans
from sfi_agent.session.token_core import TokenCore
from sfi_agent.session.token_session import TokenSession
from sfi_agent.session.tool_use.tool_running import Approve, ToolHost
from sfi_agent.session.tool_use.tools import Tool, ToolSet
from sfi_agent.session.turn import BegunTurn, TurnRunner
from sfi_agent.session.turn_moves import TurnMoves
from sfi_agent.session.user_input import UserInput

if TYPE_CHECKING:
    from typing_extensions import Self

    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine

__all__ = ["Session"]


class Session(TokenSession):
    """A sequence that lasts: its history survives turns, tool calls and forks.

    Made by `engine.session(...)`. It is new until first use, then open, then closed; `with`
    closes it, `close()` does the same, and both free the history. One call uses it at a time,
    whatever thread or task it comes from.

    `asend`, `arun` and `astream` are `send`, `run` and `stream` for callers in an event loop, with
    the same arguments: steps are taken on the engine's thread, together with those of other
    sessions, and async tools run in the caller's loop.
    """

    def __init__(
        self,
        engine: Engine,
        core: TokenCore,
        chat: Chat | None,
        overflow: OverflowPolicy = "error",
    ) -> None:
        super().__init__(engine, core, chat)
        self._overflow = checked_policy(overflow)
        self._shares_steps = _selects_safely(core.config)
        self._last_reply: Reply | None = None
        self._turns = 0
        self._streams: weakref.WeakSet[Generator[Event, None, None] | EventStream]
        self._streams = weakref.WeakSet()

    @classmethod
    def create(
        cls,
        engine: Engine,
        config: SessionConfig,
        system: str | None,
        tools: Sequence[Callable[..., Any] | Tool],
        overflow: OverflowPolicy,
    ) -> Self:
        """A new session; users call `engine.session(...)`."""
        generation_config = getattr(engine.model, "generation_config", None)
        chat = make_chat(
            engine.tokenizer, generation_config, system, tools, config.history.reasoning
        )
        return cls(engine, TokenCore(engine, config), chat, overflow)

    def send(self, message: UserInput, *, timeout_seconds: float | None = None) -> Reply:
        """One assistant turn. Tool calls are returned, not run.

        Args:
            message: Text of the user, one message, or several. Results of tool calls are messages
                `{"role": "tool", "tool_call_id": ..., "content": ...}`, one for every call.
            timeout_seconds: Time for the call; when it is over, the turn ends as if `cancel()` had
                been called. None sets no limit.

        Raises:
            InputError: The message or an argument is unusable; nothing has changed.
            ContextOverflowError: It does not fit the model's context; nothing has changed.
            TemplateError: There is no chat template, or it cannot render the message.
            SessionBusy: Another call on this session is under way.
            SessionStateError: The session is closed.
        """
        request = TurnRequest.single("send", message, timeout_seconds)
        return _reply_of(self._events(request))

    def run(
        self,
        message: UserInput,
        *,
        max_turns: int = 8,
        timeout_seconds: float | None = None,
        approve: Approve | None = None,
    ) -> Reply:
        """The tool loop: the model's turns and the tools it calls, until it answers.

        Args:
            message: As in `send`.
            max_turns: Most assistant turns. A run that needs more ends with finish reason
                "max_turns", its last calls not run.
            timeout_seconds: As in `send`, for all turns and tools together.
            approve: Asked about every call that could be run, before any of its turn is: True lets
                it run; False or a text, the reason, refuses it, and the model reads that. May be
                async. What it raises ends the run before a tool of that turn has run.

        Returns:
            The last turn's text and calls; usage and steps are those of all turns.

        Raises:
            InputError, ContextOverflowError, TemplateError, SessionBusy, SessionStateError: As in
                `send`. An overflow in a later turn leaves the earlier ones in place.
        """
        request = TurnRequest.loop("run", message, max_turns, timeout_seconds, approve)
        return _reply_of(self._events(request))

    def stream(
        self,
        message: UserInput,
        *,
        max_turns: int = 8,
        timeout_seconds: float | None = None,
        approve: Approve | None = None,
    ) -> Iterator[Event]:
        """The tool loop as typed events, as they happen.

        `Step` comes for every token; `TextDelta`, `ReasoningDelta` and `ToolCall` as the output
        is understood; `TurnEnd` with each turn's own reply; behind it `ToolStart` when a tool
        begins and `ToolResult` when it has finished. The last event is a `TurnEnd`. Closing the
        iterator ends the turn; what was generated stays part of the session.

        Args:
            message: As in `send`.
            max_turns, timeout_seconds, approve: As in `run`.

        Raises:
            InputError, ContextOverflowError, TemplateError, SessionBusy, SessionStateError: As in
                `send`, when the first event is asked for.
        """
        request = TurnRequest.loop("stream", message, max_turns, timeout_seconds, approve)
        events = self._events(request)
        self._streams.add(events)
        return events

    async def asend(self, message: UserInput, *, timeout_seconds: float | None = None) -> Reply:
        """`send` for a caller in an event loop. Cancelling the task cancels the turn."""
        request = TurnRequest.single("asend", message, timeout_seconds)
        return await self._reply_to(request)

    async def arun(
        self,
        message: UserInput,
        *,
        max_turns: int = 8,
        timeout_seconds: float | None = None,
        approve: Approve | None = None,
    ) -> Reply:
        """`run` for a caller in an event loop. Cancelling the task cancels turn and tools."""
        request = TurnRequest.loop("arun", message, max_turns, timeout_seconds, approve)
        return await self._reply_to(request)

    def astream(
        self,
        message: UserInput,
        *,
        max_turns: int = 8,
        timeout_seconds: float | None = None,
        approve: Approve | None = None,
    ) -> EventStream:
        """`stream` for a caller in an event loop: `async for event in session.astream(...)`."""
        request = TurnRequest.loop("astream", message, max_turns, timeout_seconds, approve)
        events = EventStream(self._async_call(request, ends_only=False))
        self._streams.add(events)
        return events

    def branch(
        self, n: int, message: UserInput | None = None, *, seeds: Sequence[int] | None = None
    ) -> list[Self]:
        """Several continuations, taken together: pick one and close the others.

        Every branch is a fork of this session, which stays as it is. The message is processed once
        and what it became is shared, and the branches share the model's steps. `cancel()` ends the
        turns of all of them.

        Args:
            n: How many, at least 1.
            message: As in `send`, which each of them answers with one turn (`last_reply`). None
                goes on from the pending token to the end of the turn.
            seeds: `sampling.seed` of each; None takes the session's own, which goes on as the
                session itself would, and those behind it. Without sampling all branches are alike.

        Returns:
            Open sessions. Their usage counts what the message cost once, for the first.

        Raises:
            InputError, ContextOverflowError, TemplateError, SessionBusy, SessionStateError: As in
                `send`; a hook for overflows is not asked. What a branch raises closes all.
            NothingPendingError: There is no message, and no token to go on from.
        """
        from sfi_agent.session.branching import branch_seeds, grow_branches

        chosen = branch_seeds(n, seeds, self.config.sampling.seed)
        return grow_branches(self, chosen, message)

    @property
    def last_reply(self) -> Reply | None:
        """The reply of the last assistant turn that was taken on this session; None before."""
        return self._last_reply

    def close(self) -> None:
        """Free the history; closing twice is fine. Streams that are under way are ended.

        Raises:
            SessionBusy: Another thread is using the session, or one of its tools is the caller.
        """
        self._owner.refuse_in_tool("close")
        for stream in list(self._streams):
            if isinstance(stream, EventStream):
                self._refuse_on_engine_thread()
                stream.close_and_wait(LONGEST_WAIT_SECONDS)
                continue
            try:
                stream.close()
            except ValueError:
                pass  # It is running in another thread right now: busy, as said below.
        super().close()

    def _child(self, core: TokenCore, chat: Chat | None) -> Self:
        # A hook that summarizes in a fork must not be asked to shorten that fork.
        overflow = "error" if hook_is_asked() else self._overflow
        return type(self)(self.engine, core, chat, overflow)

    def _events(self, request: TurnRequest) -> Generator[Event, None, None]:
        """Events of a call, driven by whoever asks for them."""
        return self._driven(request, self._spans())

    def _driven(self, request: TurnRequest, spans: SessionSpans) -> Generator[Event, None, None]:
        with self._owner.held_for(request.action) as lease:
            self._cancelled.clear(request.timeout_seconds)
            moves = self._moves(request, spans, lease)
            host = self._tool_host(spans)
            yield from drive_here(moves, self._core.runner, host, request.approve)

    async def _reply_to(self, request: TurnRequest) -> Reply:
        events = EventStream(self._async_call(request, ends_only=True))
        return _reply_of([event async for event in events])

    def _async_call(self, request: TurnRequest, *, ends_only: bool) -> AsyncCall:
        spans = self._spans()
        return AsyncCall(
            request,
            partial(self._moves, request, spans),
            self._tool_host(spans),
            self._core.runner,
            self.engine.thread,
            self._shares_steps,
            self.config.mode == "slow_fast" and self.config.slow_step != "observe",
            ends_only,
        )

    def _moves(
        self,
        request: TurnRequest,
        spans: SessionSpans,
        lease: Lease,
        begun: BegunTurn | None = None,
    ) -> TurnMoves[None]:
        """The turns of a call that owns the session."""
        self._core.open()
        chat = self._chat_for(request.action)
        if request.max_turns:
            chat.tools.require_functions(request.action)
        assert self.engine.tokenizer is not None
        runner = TurnRunner(
            self,
            self._core,
            chat,
            self.engine.tokenizer,
            self._cancelled,
            lease,
            self._overflow,
            spans,
        )
        before = len(self._core.ids)
        try:
            if request.max_turns:
                yield from runner.loop(request.message, request.max_turns)
            else:
                yield from runner.single(request.message, begun)
        finally:
            kept = runner.smallest_kept_tokens
            if kept is not None and kept < before:
                self._marks.note_cut(kept)

    def _chat_for(self, action: str) -> Chat:
        """The chat of a call that needs one."""
        if self._chat is None or self.engine.tokenizer is None:
            raise TemplateError(
                explain(
                    f"called session.{action}() with messages",
                    got="a tokenizer without a chat template, or no tokenizer",
                    remedy="set tokenizer.chat_template, or use session.decode with token ids",
                )
            )
        return self._chat

    def _spans(self) -> SessionSpans:
        """Spans of one call; made where it is called, for the parent span is found there."""
        return SessionSpans(self._core, self._chat, self.engine.telemetry)

    def _tool_host(self, spans: SessionSpans) -> ToolHost:
        tools = self._chat.tools if self._chat is not None else ToolSet()
        seconds = self.config.tools.timeout_seconds
        return ToolHost(tools, seconds, self._cancelled, self._owner, spans)

    def _refuse_on_engine_thread(self) -> None:
        if self.engine.thread.is_current:
            raise SessionBusy(
                explain("closed a session from within a step", got="a call that waits for the step")
            )


def _reply_of(events: Iterable[Event]) -> Reply:
    return sum_replies(event.reply for event in events if isinstance(event, TurnEnd))


def _selects_safely(config: SessionConfig) -> bool:
    """Whether no plugin from elsewhere, which may raise, selects inside of a step."""
    if config.mode == "dense":
        return True
    return load_plugins().find("selector", config.selector.name).origin == BUILT_IN
