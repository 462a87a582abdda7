"""One owner at a time: a second caller gets `SessionBusy` instead of a race.

While tools run, the owner *rests*: the session is between two steps, so forks, marks and the like
may look at it, one after the other, and nothing goes on under them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sfi_agent.errors import SessionBusy, explain

__all__ = ["LONGEST_WAIT_SECONDS", "Lease", "Ownership"]

LONGEST_WAIT_SECONDS = 60.0
"""For an owner that is leaving, which takes it one step of the model."""
_LOOK_AGAIN_SECONDS = 0.001

_tools_of: ContextVar[frozenset[int]] = ContextVar("sfi_agent_tools_of", default=frozenset())


class Lease:
    """The right to work on a session, until it is released.

    Args:
        ownership: Whose.
        action: What is being done, for the message that others get.

    Attributes:
        is_left: Asked when somebody else wants the session: whether the owner's reader will never
            come back. The owner then leaves.
    """

    def __init__(self, ownership: Ownership, action: str) -> None:
        self.action = action
        self.is_left: Callable[[], bool] = lambda: False
        self._ownership = ownership
        self._leaving = False
        self._resting = False

    @property
    def leaving(self) -> bool:
        """Whether nobody waits for the owner any more: it ends with its present step."""
        return self._leaving or self.is_left()

    @property
    def resting(self) -> bool:
        """Whether the session is between two steps and others may look at it."""
        return self._resting

    def leave(self) -> None:
        """The owner ends by itself soon. Takes no lock: garbage collection may call it."""
        self._leaving = True

    def rest(self) -> None:
        """Let others look at the session."""
        self._resting = True

    def resume(self) -> None:
        """Go on, once nobody looks any more; fine on a lease that does not rest."""
        self._ownership._resume(self)

    def release(self) -> None:
        """Give the session back; twice is fine."""
        self._ownership._release(self)


class Ownership:
    """Who works on a session."""

    def __init__(self) -> None:
        # Reentrant inside, because garbage collection may release a lease anywhere.
        self._changed = threading.Condition()
        self._lease: Lease | None = None
        self._looking = False

    def take(self, action: str) -> Lease:
        """Own the session. Waits only for an owner that is leaving, or for one who still looks.

        Args:
            action: What is being done, such as "send".

        Raises:
            SessionBusy: Somebody owns it.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: not self._must_wait(action), LONGEST_WAIT_SECONDS
            ):
                raise self._busy(action)
            return self._taken(action)

    def try_take(self, action: str) -> Lease | None:
        """Own the session if nobody does; never waits."""
        with self._changed:
            if self._lease is not None or self._looking:
                return None
            return self._taken(action)

    async def take_async(self, action: str) -> Lease:
        """As `take`, without blocking the event loop."""
        while True:
            with self._changed:
                if not self._must_wait(action):
                    return self._taken(action)
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    @contextmanager
    def held_for(self, action: str) -> Iterator[Lease]:
        """Own the session for the length of a with block (see `take`)."""
        lease = self.take(action)
        try:
            yield lease
        finally:
            lease.release()

    @contextmanager
    def looking(self, action: str) -> Iterator[None]:
        """Look at a session that does not move: nobody owns it, or its owner rests.

        Several who look at a resting session wait for each other.

        Raises:
            SessionBusy: Somebody works on it.
        """
        with self._changed:
            beside = self._lease is not None and self._lease.resting
            while beside and self._looking:
                self._changed.wait()
                beside = self._lease is not None and self._lease.resting
            if beside:
                self._looking = True
        if not beside:
            with self.held_for(action):
                yield
            return
        try:
            yield
        finally:
            with self._changed:
                self._looking = False
                self._changed.notify_all()

    def enter_tool(self) -> None:
        """From here on this context belongs to a tool that the session runs."""
        _tools_of.set(_tools_of.get() | {id(self)})

    def refuse_in_tool(self, action: str) -> None:
        """Refuse what would end the very call that waits for the tool.

        Raises:
            SessionBusy: The caller is a tool of this session's present call.
        """
        with self._changed:
            if self._lease is not None and id(self) in _tools_of.get():
                raise self._busy(action)

    def _must_wait(self, action: str) -> bool:
        """Whether the session will be free without anybody's doing; refuses where it will not."""
        if self._lease is not None and not self._lease.leaving:
            raise self._busy(action)
        return self._lease is not None or self._looking

    def _taken(self, action: str) -> Lease:
        self._lease = Lease(self, action)
        return self._lease

    def _resume(self, lease: Lease) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not (lease.resting and self._looking))
            lease._resting = False

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if self._lease is lease:
                self._lease = None
                self._changed.notify_all()

    def _busy(self, action: str) -> SessionBusy:
        holder = self._lease.action if self._lease is not None else action
        return SessionBusy(
            explain(
                f"called session.{action}() while the session is busy",
                got=f"session.{holder}() still under way",
                allowed="one call at a time per session",
                remedy="wait for it, or finish or close the running stream; a fork made "
                "before, or by a tool while it runs, can work beside it",
            )
        )
