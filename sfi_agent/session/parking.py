"""Idle sessions out of the way: to host memory, then to disk, and back when they are used.

Ids, messages and records stay where they are; keys and values move. What forks share moves when
none of them is at work. A parked session comes back by itself with its next call.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from sfi_agent.engine.parked_buffers import (
    Parked,
    Place,
    buffers_of,
    move_back,
    move_to_disk,
    move_to_host,
)
from sfi_agent.errors import InputError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.store.directory import directory_path

if TYPE_CHECKING:
    from sfi_agent.engine.history import Buffer
    from sfi_agent.engine.runner import Runner
    from sfi_agent.engine.sequence import SequenceState
    from sfi_agent.session.token_core import TokenCore

__all__ = ["ParkingLimits", "ParkingLot"]


@dataclass(frozen=True, slots=True)
class ParkingLimits:
    """When idle sessions are parked by themselves, the least recently used first.

    The limits are looked at whenever a session begins to work: it comes back, and others leave
    until what all sessions hold fits again. A session at work is never parked.

    Attributes:
        device_bytes: Keys, values and memories on the model's device; None sets no limit. Beyond it
            sessions go to host memory, and on a CPU, which has nothing else, to disk.
        host_bytes: Parked keys and values in host memory; None sets no limit. Beyond it they go to
            disk. Makes no difference on a CPU.
        directory: Where they go on disk; None keeps them off it. Files there have no name once they
            are written: nothing is left behind when the process ends.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    directory: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes"):
            limit = getattr(self, name)
            if limit is None:
                continue
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
                allowed = "bytes, at least 0, or None"
                raise InputError(
                    explain(f"gave ParkingLimits {name}", got=repr(limit), allowed=allowed)
                )
        if self.directory is not None:
            directory_path(self.directory)
        if self.host_bytes is not None and self.directory is None:
            raise InputError(
                explain(
                    "limited parked sessions in host memory",
                    got="host_bytes without a directory",
                    remedy="say with directory= where they go beyond the limit",
                )
            )


class ParkingLot:
    """The sessions of one engine, and which of them are parked.

    Args:
        runner: Of the engine.
        limits: See `ParkingLimits`.

    Raises:
        InputError: On a CPU, a limit without a directory.
    """

    def __init__(self, runner: Runner, limits: ParkingLimits) -> None:
        self._runner = runner
        self._limits = limits
        self._device = runner.shape.device
        if self._on_cpu and limits.device_bytes is not None and limits.directory is None:
            raise InputError(
                explain(
                    "limited the sessions of a model on a CPU",
                    got="device_bytes without a directory",
                    remedy="say with directory= where they go beyond the limit",
                )
            )
        self._cores: WeakSet[TokenCore] = WeakSet()
        self._away: WeakKeyDictionary[Buffer, Parked] = WeakKeyDictionary()
        self._lock = threading.RLock()

    @property
    def _on_cpu(self) -> bool:
        return self._device.type == "cpu"

    def register(self, core: TokenCore) -> None:
        """A session has been opened."""
        with self._lock:
            self._cores.add(core)
            core.last_used = time.monotonic()

    def begin(self, core: TokenCore) -> None:
        """A session is about to work: it comes back, and idle ones make room.

        Raises:
            OutOfDeviceMemoryError: There is no room for it; it stays parked.
        """
        with self._lock:
            core.last_used = time.monotonic()
            if core.parked is not None:
                self._bring_back(core)
            if self._limits.device_bytes is not None:
                self._make_room(core)

    def park(
        self, core: TokenCore, place: Place | None, directory: str | os.PathLike[str] | None
    ) -> None:
        """See `Engine.park`; the caller owns the session."""
        given = directory if directory is not None else self._limits.directory
        folder = None if given is None else directory_path(given)
        if place is None:
            place = "disk" if self._on_cpu and folder is not None else "host"
        if place not in ("host", "disk"):
            raise InputError(
                explain("parked a session", got=f"to={place!r}", allowed="'host' or 'disk'")
            )
        if place == "disk" and folder is None:
            raise InputError(
                explain(
                    "parked a session on disk",
                    got="no directory",
                    remedy="give directory=, or make the Engine with parking=ParkingLimits(...)",
                )
            )
        with self._lock:
            self._park(core, place, folder)

    def device_bytes(self) -> int:
        """What open sessions hold on the model's device, what they share counted once."""
        with self._lock:
            memories = sum(sequence.memory_bytes for sequence in self._sequences(self._cores))
            return memories + sum(buffer.nbytes for buffer in self._resident())

    def host_bytes(self) -> int:
        """What is parked in host memory."""
        with self._lock:
            return sum(
                buffer.nbytes for buffer, parked in self._away.items() if parked.place == "host"
            )

    def _bring_back(self, core: TokenCore) -> None:
        started, moved = time.perf_counter(), 0
        sequence = core.sequence
        assert sequence is not None
        with self._runner.exclusive([sequence]):
            for buffer in buffers_of([sequence]):
                parked = self._away.get(buffer)
                if parked is not None:
                    move_back(buffer, parked, self._device)
                    del self._away[buffer]
                    moved += buffer.nbytes
        sequence.moves.count += 1
        place, core.parked = core.parked, None
        log_event(
            "info",
            "session_resumed",
            session=core.id,
            place=place,
            moved_bytes=moved,
            seconds=round(time.perf_counter() - started, 6),
        )

    def _park(self, core: TokenCore, place: Place, folder: Path | None) -> None:
        before = core.parked
        if core.sequence is None or (before == "disk" and place == "host"):
            return
        started = time.perf_counter()
        if before is None:
            # A fresh state: what captured steps know of the old one ends with it.
            core.renew_sequence()
        core.parked = place
        try:
            moved = self._move_idle(place, folder)
        except BaseException:
            # Whole again, and to be parked once there is room: what has moved already comes back.
            if before is None:
                self._bring_back(core)
            core.parked = before
            raise
        log_event(
            "info",
            "session_parked",
            session=core.id,
            place=place,
            moved_bytes=moved,
            seconds=round(time.perf_counter() - started, 6),
        )

    def _move_idle(self, place: Place, folder: Path | None) -> int:
        """Move what only parked sessions read, as far as the nearest of them; returns the bytes
        that were moved."""
        active, near, far = (
            buffers_of(self._sequences(core for core in self._cores if core.parked == where))
            for where in (None, "host", "disk")
        )
        moved = 0
        with self._runner.exclusive(()):
            for buffer in {**near, **far}:
                to_disk = place == "disk" and buffer not in near
                known = self._away.get(buffer)
                if buffer in active or (
                    known is not None and (known.place == "disk" or not to_disk)
                ):
                    continue
                capacity = known.capacity if known is not None else buffer.capacity
                # All who read it count: the longest of them may be parked elsewhere.
                used = max(near.get(buffer, 0), far.get(buffer, 0))
                if to_disk:
                    assert folder is not None
                    move_to_disk(buffer, used, folder)
                elif self._on_cpu or buffer.home is not None:
                    continue  # It is in host memory already.
                else:
                    move_to_host(buffer, used)
                self._away[buffer] = Parked("disk" if to_disk else "host", capacity)
                moved += buffer.nbytes
        return moved

    def _make_room(self, working: TokenCore) -> None:
        limit, folder = self._limits.device_bytes, self._limits.directory
        first: Place = "disk" if self._on_cpu else "host"
        self._leave(working, first, lambda: limit is not None and self.device_bytes() > limit)
        most = self._limits.host_bytes
        if not self._on_cpu and folder is not None:
            self._leave(working, "disk", lambda: most is not None and self.host_bytes() > most)

    def _leave(self, working: TokenCore, place: Place, is_over: Callable[[], bool]) -> None:
        """Park idle sessions, the least recently used first, while a limit is exceeded."""
        if not is_over():
            return
        folder = None if self._limits.directory is None else Path(self._limits.directory)
        # What parked sessions shared with one that was closed since.
        self._move_idle(place, folder)
        leaving = {"host": (None,), "disk": (None, "host") if self._on_cpu else ("host",)}[place]
        waiting = sorted(
            (core for core in self._cores if core is not working and core.parked in leaving),
            key=lambda core: core.last_used,
        )
        for core in waiting:
            if not is_over():
                return
            lease = core.owner.try_take("park")
            if lease is None:
                continue
            # Whoever wants the session now waits for it instead of being refused.
            lease.leave()
            try:
                self._park(core, place, folder)
            finally:
                lease.release()

    def _resident(self) -> Iterable[Buffer]:
        buffers = buffers_of(self._sequences(self._cores))
        return [
            b for b in buffers if b not in self._away and b.keys.device.type == self._device.type
        ]

    @staticmethod
    def _sequences(cores: Iterable[TokenCore]) -> list[SequenceState]:
        return [core.sequence for core in cores if core.sequence is not None]
