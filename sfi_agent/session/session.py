"""The Session: one conversation over one persistent history."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from sfi_agent.config import SessionConfig
from sfi_agent.engine.instruments import Instruments
from sfi_agent.errors import TemplateError, explain
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.arguments import at_least
from sfi_agent.session.chat import Chat, make_chat
from sfi_agent.session.events import Event, TurnEnd
from sfi_agent.session.marks import Mark, MarkKeeper
from sfi_agent.session.ownership import Ownership
from sfi_agent.session.raw_decoding import RawDecoding
from sfi_agent.session.reply import Reply, sum_replies
from sfi_agent.session.stats import SessionStats
from sfi_agent.session.token_core import TokenCore
from sfi_agent.session.turn import TurnRunner
from sfi_agent.session.user_input import UserInput

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor
    from typing_extensions import Self

    from sfi_agent.session.engine import Engine
    from sfi_agent.session.tools import Tool

__all__ = ["Session"]


class Session:
    """A sequence that lasts: its history survives turns, tool calls and forks.

    Made by `engine.session(...)`. It is new until first use, then open, then closed; `with`
    closes it, `close()` does the same, and both free the history. One thread uses it at a time.
    """

    def __init__(self, engine: Engine, core: TokenCore, chat: Chat | None) -> None:
        self.engine = engine
        self._core = core
        self._chat = chat
        self._owner = Ownership()
        self._marks = MarkKeeper()
        self._cancelled = threading.Event()
        self._stream: weakref.ref[Generator[Event, None, None]] | None = None

    @classmethod
    def create(
        cls,
        engine: Engine,
        config: SessionConfig,
        system: str | None,
        tools: Sequence[Callable[..., Any] | Tool],
    ) -> Self:
        """A new session; users call `engine.session(...)`."""
        generation_config = getattr(engine.model, "generation_config", None)
        chat = make_chat(engine.tokenizer, generation_config, system, tools)
        return cls(engine, TokenCore(engine, config), chat)

    @property
    def id(self) -> str:
        """Names the session in log events."""
        return self._core.id

    @property
    def config(self) -> SessionConfig:
        """The policy; fixed for the session, `fork(config)` takes another."""
        return self._core.config

    @property
    def status(self) -> Literal["new", "open", "closed"]:
        """Whether the session is new, open or closed."""
        return self._core.status

    @property
    def token_ids(self) -> list[int]:
        """Every id of the sequence, the pending last one included (a copy)."""
        return list(self._core.ids)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as messages: a view of the ids (a copy)."""
        return self._chat.messages if self._chat is not None else []

    @property
    def trace(self) -> list[StepRecord]:
        """One record per generated and kept token (a copy)."""
        return list(self._core.trace)

    @property
    def stats(self) -> SessionStats:
        """Slow share, tokens by kind, bytes of history and memory."""
        return self._core.stats()

    def send(self, message: UserInput) -> Reply:
        """One assistant turn. Tool calls are returned, not run.

        Args:
            message: Text of the user, one message, or several. Results of tool calls are messages
                `{"role": "tool", "tool_call_id": ..., "content": ...}`, one for every call.

        Raises:
            InputError: The message is unusable; nothing has changed.
            ContextOverflowError: It does not fit the model's context; nothing has changed.
            TemplateError: There is no chat template, or it cannot render the message.
            SessionBusy: Another call on this session is under way.
            SessionStateError: The session is closed.
        """
        replies = [
            event.reply for event in self._events("send", message, 0) if isinstance(event, TurnEnd)
        ]
        return replies[0]

    def run(self, message: UserInput, *, max_turns: int = 8) -> Reply:
        """The tool loop: the model's turns and the tools it calls, until it answers.

        Args:
            message: As in `send`.
            max_turns: Most assistant turns. A run that needs more ends with finish reason
                "max_turns", its last calls not run.

        Returns:
            The last turn's text and calls; usage and steps are those of all turns.

        Raises:
            InputError, ContextOverflowError, TemplateError, SessionBusy, SessionStateError: As in
                `send`. An overflow in a later turn leaves the earlier ones in place.
        """
        events = self._events("run", message, at_least("max_turns", max_turns, 1))
        reply = sum_replies(event.reply for event in events if isinstance(event, TurnEnd))
        if reply.finish_reason == "tool_calls":
            # Only `cancel()`, while the tools ran, lets a run end between calls and answer.
            return replace(reply, finish_reason="cancelled")
        return reply

    def stream(self, message: UserInput, *, max_turns: int = 8) -> Iterator[Event]:
        """The tool loop as typed events, as they happen.

        `Step` comes for every token; `TextDelta`, `ReasoningDelta` and `ToolCall` as the output
        is understood; `ToolResult` after a tool ran; `TurnEnd` with each turn's own reply.
        Closing the iterator ends the turn; what was generated stays part of the session.

        Args:
            message: As in `send`.
            max_turns: As in `run`.

        Raises:
            InputError, ContextOverflowError, TemplateError, SessionBusy, SessionStateError: As in
                `send`, when the first event is asked for.
        """
        events = self._events("stream", message, at_least("max_turns", max_turns, 1))
        self._stream = weakref.ref(events)
        return events

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        given_ids: Sequence[int] = (),
    ) -> list[int]:
        """Append raw ids and decode: no template, no BOS, no stop ids but those given.

        Args:
            token_ids: New ids behind the present ones; `[]` goes on from the pending token.
            max_new_tokens: At most so many are generated; None takes `sampling.max_new_tokens`.
                0 only processes the ids and leaves the last one pending.
            stop_ids: Generating one of these ends the decoding; it is the last id returned.
            given_ids: Taken for the first tokens behind `token_ids`, under the policy's steps,
                before any is chosen (see `follow`).

        Returns:
            The generated ids, without those given.

        Raises:
            InputError: An id, a stop id or the limit is not usable.
            NothingPendingError: `token_ids` is empty and no token is pending.
            ContextOverflowError: The model's context would not hold ids and new tokens.
            SessionBusy: Another call on this session is under way.
            SessionStateError: The session is closed.
        """
        with self._raw_decoding("decode") as raw:
            limits = raw.limits(max_new_tokens, stop_ids, given_ids)
            records = raw.decode(token_ids, limits)
            return [record.token_id for record in records[len(limits.given_ids) :]]

    def follow(
        self, token_ids: Sequence[int], *, prompt_ids: Sequence[int] = ()
    ) -> list[StepRecord]:
        """Decode as the policy does, but with given tokens in place of chosen ones.

        Teacher forcing: kinds of steps, refreshes and retries are those that the policy takes on
        this text. `attach` sees what the model would have said.

        Args:
            token_ids: What comes after the pending token, or after the prompt.
            prompt_ids: New ids to process first, as `decode` would.

        Returns:
            The records of these tokens, which are now part of the session.

        Raises:
            InputError, NothingPendingError, ContextOverflowError, SessionBusy, SessionStateError:
                As in `decode`.
        """
        with self._raw_decoding("follow") as raw:
            return raw.decode(prompt_ids, raw.limits(0, (), token_ids))

    @contextmanager
    def _raw_decoding(self, action: str) -> Iterator[RawDecoding]:
        """Own the session for a call that works on raw ids; for the package's own use."""
        with self._owner.held_for(action):
            yield RawDecoding(self._core, self._chat, self._cancelled)

    def attach(self, instruments: Instruments) -> None:
        """Let functions look on at every later step, in place of those attached before.

        Raises:
            SessionBusy: Another call on this session is under way.
            SessionStateError: The session is closed.
        """
        with self._owner.held_for("attach"):
            self._core.open()
            self._core.attach(instruments)

    def next_logits(self) -> Tensor:
        """What the next token would be drawn from: float32 `[vocabulary]` on the CPU.

        Raises:
            NothingPendingError: No token is pending.
        """
        with self._owner.held_for("next_logits"):
            return self._core.next_logits()

    def mark(self, token_count: int | None = None) -> Mark:
        """A place to come back to with `rewind`.

        Args:
            token_count: Ids before the mark, also inside generated text; None means all.
        """
        with self._owner.held_for("mark"):
            self._core.open()
            present = len(self._core.ids)
            return self._marks.mark(present if token_count is None else token_count, present)

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark, as if nothing had happened since. The last id is then pending.

        Raises:
            InputError: The mark belongs to another session.
            SessionStateError: What it points to was removed by an earlier rewind.
        """
        with self._owner.held_for("rewind"):
            self._core.open()
            self._marks.check(mark)
            self._core.cut(mark.token_count)
            if self._chat is not None:
                self._chat.cut(mark.token_count)
            self._marks.note_cut(mark.token_count)

    def fork(self, config: SessionConfig | None = None, *, seed: int | None = None) -> Session:
        """An open session with the same past and its own future; nothing is copied.

        Args:
            config: Another policy for the child; None keeps this one's.
            seed: `sampling.seed` of the child, so that forks sample differently; None keeps it.

        Raises:
            ConfigError: The policy does not fit the model, or the seed is not valid.
        """
        chosen = config or self.config
        if seed is not None:
            chosen = chosen.replace(sampling={"seed": seed})
        self.engine.check_config(chosen)
        with self._owner.held_for("fork"):
            chat = self._chat.fork() if self._chat is not None else None
            return Session(self.engine, self._core.fork(chosen), chat)

    def cancel(self) -> None:
        """Stop what the session is doing, from any thread; ids and history stay consistent."""
        self._cancelled.set()

    def close(self) -> None:
        """Free the history; closing twice is fine. A stream that nobody reads on is ended.

        Raises:
            SessionBusy: Another thread is using the session.
        """
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            try:
                stream.close()
            except ValueError:
                pass  # It is running in another thread right now: busy, as said below.
        with self._owner.held_for("close"):
            self._core.close()

    def __enter__(self) -> Self:
        self._core.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        core = self._core
        return (
            f"Session({core.status}, {len(core.ids)} tokens, mode={core.config.mode!r}, "
            f"selector={core.config.selector.name!r})"
        )

    def _events(
        self, action: str, message: UserInput, max_turns: int
    ) -> Generator[Event, None, None]:
        """Events of one turn (`max_turns` 0, no tools) or of the tool loop, owning the session."""
        with self._owner.held_for(action):
            self._core.open()
            self._cancelled.clear()
            if self._chat is None or self.engine.tokenizer is None:
                raise TemplateError(
                    explain(
                        f"called session.{action}() with messages",
                        got="a tokenizer without a chat template, or no tokenizer",
                        remedy="set tokenizer.chat_template, or use session.decode with token ids",
                    )
                )
            runner = TurnRunner(
                self._core, self._chat, self.engine.tokenizer, self._cancelled.is_set
            )
            before = len(self._core.ids)
            try:
                yield from runner.loop(message, max_turns) if max_turns else runner.turn(message)
            finally:
                kept = runner.smallest_kept_tokens
                if kept is not None and kept < before:
                    self._marks.note_cut(kept)
