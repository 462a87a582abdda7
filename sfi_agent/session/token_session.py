"""The session below messages: ids, marks, forks, and what can be looked at."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from sfi_agent.config import SessionConfig
from sfi_agent.engine.instruments import Instruments
from sfi_agent.errors import InputError, explain
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.cancellation import Cancellation
from sfi_agent.session.chat import Chat
from sfi_agent.session.grammar.call_decoding import watch_maker
from sfi_agent.session.marks import Mark, MarkKeeper
from sfi_agent.session.raw_decoding import RawDecoding
from sfi_agent.session.stats import SessionStats
from sfi_agent.session.token_core import TokenCore

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor
    from typing_extensions import Self

    from sfi_agent.engine.parked_buffers import Place
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.store.report import SaveReport

__all__ = ["TokenSession"]


class TokenSession:
    """One sequence of ids over one persistent history, with one caller at a time.

    Args:
        engine: Made the session.
        core: Ids and history.
        chat: Messages, told of what happens to the ids; None without a chat template.
    """

    def __init__(self, engine: Engine, core: TokenCore, chat: Chat | None) -> None:
        self.engine = engine
        core.make_watch = watch_maker(engine, core.config, chat)
        self._core = core
        self._chat = chat
        self._owner = core.owner
        self._marks = MarkKeeper()
        self._cancelled = Cancellation()

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
    def parked(self) -> Place | None:
        """Where the history is while the session is parked, "host" or "disk"; None otherwise."""
        return self._core.parked

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
            InputError: It is something else.
            SessionBusy: Another call on this session is under way.
            SessionStateError: The session is closed.
        """
        if not isinstance(instruments, Instruments):
            allowed = "Instruments; without functions nobody looks on"
            raise InputError(explain("attached", got=repr(instruments), allowed=allowed))
        with self._owner.held_for("attach"):
            self._core.open()
            self._core.attach(instruments)

    def next_logits(self) -> Tensor:
        """What the next token would be drawn from: float32 `[vocabulary]` on the CPU.

        Raises:
            NothingPendingError: No token is pending.
        """
        with self._owner.looking("next_logits"):
            return self._core.next_logits()

    def mark(self, token_count: int | None = None) -> Mark:
        """A place to come back to with `rewind`.

        Args:
            token_count: Ids before the mark, also inside generated text; None means all.

        Raises:
            InputError: The session has no such number of ids.
            SessionStateError: It is closed.
            SessionBusy: Another call is under way, and not between two steps.
        """
        with self._owner.looking("mark"):
            self._core.open()
            present = len(self._core.ids)
            count = present if token_count is None else token_count
            return self._marks.mark(count, present, self._core.history_at)

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark, as if nothing had happened since. The last id is then pending.

        Raises:
            InputError: The mark belongs to another session.
            SessionStateError: What it points to was removed by an earlier rewind.
        """
        with self._owner.held_for("rewind"):
            self._core.open()
            history_tokens = self._marks.check(mark)
            self._core.cut(mark.token_count, history_tokens)
            if self._chat is not None:
                self._chat.cut(mark.token_count)
            self._marks.note_cut(mark.token_count)

    def fork(self, config: SessionConfig | None = None, *, seed: int | None = None) -> Self:
        """An open session with the same past and its own future; nothing is copied.

        Args:
            config: Another policy for the child; None keeps this one's.
            seed: `sampling.seed` of the child, so that forks sample differently; None keeps it.

        Raises:
            ConfigError: The policy does not fit the model, or the seed is not valid.
        """
        chosen = self.config if config is None else config
        self.engine.check_config(chosen)
        if seed is not None:
            chosen = chosen.replace(sampling={"seed": seed})
        with self._owner.looking("fork"):
            chat = self._chat
            if chat is not None:
                chat = chat.fork(chosen.history.reasoning)
            return self._child(self._core.fork(chosen), chat)

    def _child(self, core: TokenCore, chat: Chat | None) -> Self:
        return type(self)(self.engine, core, chat)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> SaveReport:
        """Write the whole session, keys and values included, for `engine.load_session`.

        Saving again to the same directory writes what is new. Whatever interrupts a save leaves
        the state before it, or the new one. See docs/saving.md.

        Args:
            directory: Made if it is missing. Files in it that are not ours are left alone.
            overwrite: Whether a state that this session does not know, because somebody else saved
                this conversation there or because it cannot be read, may be given up.

        Raises:
            StoreConflictError: There is such a state, or another save is under way there.
            StoreError: The directory cannot be written, or a message is no plain data.
            SessionBusy: Another call on this session is under way.
            SessionStateError: The session is closed.
        """
        from sfi_agent.session.store.saving import save_session

        with self._owner.looking("save"):
            self._core.open()
            return save_session(self._core, self._chat, directory, overwrite=overwrite)

    def cancel(self) -> None:
        """Stop what the session is doing, from any thread; ids and history stay consistent."""
        self._cancelled.set()

    def close(self) -> None:
        """Free the history; closing twice is fine.

        Raises:
            SessionBusy: Another call on the session is under way.
        """
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
            f"{type(self).__name__}({core.status}, {len(core.ids)} tokens, "
            f"mode={core.config.mode!r}, selector={core.config.selector.name!r})"
        )
