"""Engines on a CPU that stream their histories as they would from host memory to a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sfi_agent import Engine, Session, SessionConfig
from sfi_agent.engine.copy_lanes import Mark, make_lane
from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.host_access import HostAccess
from sfi_agent.engine.host_gather import HostGather
from sfi_agent.engine.host_history import HostStore
from sfi_agent.engine.programs.choice import Execution
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sequence import SequenceState
from tests.families import model_of, word_tokenizer

__all__ = [
    "HostWays",
    "LateLane",
    "contents",
    "host_engine",
    "on_host",
    "sequence_of",
    "shared_host_engine",
]

CPU = torch.device("cpu")


@dataclass
class _LateMark:
    """Until somebody waits for it, it has not passed."""

    lane: LateLane
    number: int

    def hold(self) -> None:
        self.lane.run(self.number)

    def hold_lane(self, stream: torch.cuda.Stream) -> None:
        raise AssertionError("there is no stream on a CPU")

    def wait(self) -> None:
        self.lane.run(self.number)


class LateLane:
    """Copies as late as it may: what nobody waited for has not happened.

    Attributes:
        copied: Elements that were copied so far.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[list[tuple[Tensor, Tensor]], list[Mark]]] = deque()
        self._given = self._done = 0
        self.copied = 0

    @property
    def pending(self) -> int:
        """Copies that have not happened."""
        return self._given - self._done

    def note(self) -> Mark:
        return make_lane(CPU).note()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Mark:
        self._queue.append((list(pairs), list(after)))
        self._given += 1
        return _LateMark(self, self._given)

    def run(self, number: int) -> None:
        while self._done < number:
            pairs, after = self._queue.popleft()
            self._done += 1
            for mark in after:
                mark.wait()
            for target, source in pairs:
                assert target.is_contiguous() and source.is_contiguous()
                target.copy_(source)
                self.copied += source.numel()


@dataclass(frozen=True)
class HostWays:
    """How histories are kept and streamed.

    Attributes:
        room_bytes: Of a room on the "device"; few bytes are few tokens.
        rooms: How many there are.
        chunk_bytes: Of the keys of one buffer at most.
        late: Whether copies happen as late as they may.
        by_device: Whether the "device" gathers; else the host does.
    """

    room_bytes: int = 3000
    rooms: int = 2
    chunk_bytes: int = 4096
    late: bool = True
    by_device: bool = True

    def store(self) -> HostStore:
        lane = LateLane() if self.late else None
        return HostStore(CPU, lane, largest_chunk_bytes=self.chunk_bytes)

    def stream(self) -> HistoryStream:
        lane = LateLane() if self.late else None
        return HistoryStream(CPU, lane, room_bytes=self.room_bytes, rooms=self.rooms)


def host_engine(
    name: str,
    ways: HostWays | None = None,
    chunk: int | None = None,
    execution: Execution = "eager",
) -> Engine:
    """A fresh engine on a family's shared model; `history.device: cpu` streams there."""
    ways = ways or HostWays()
    engine = Engine(model_of(name), word_tokenizer(), prefill_chunk_tokens=chunk)
    runner = Runner(engine.model, engine.shape, chunk, execution=execution)
    gather = HostGather(CPU, by_device=ways.by_device)
    runner.host = HostAccess(ways.store(), ways.stream(), gather)
    engine.runner = runner
    return engine


@lru_cache
def shared_host_engine(
    name: str,
    ways: HostWays | None = None,
    chunk: int | None = None,
    execution: Execution = "eager",
) -> Engine:
    """The same, once: its rooms and cohorts see the sequences of many tests."""
    return host_engine(name, ways, chunk, execution)


def sequence_of(session: Session) -> SequenceState:
    """The state of an open session."""
    return session._core._opened().sequence


def contents(session: Session) -> list[Tensor]:
    """Keys and values of all layers."""
    found: list[Tensor] = []
    for layer in sequence_of(session).layers:
        if layer.history.tokens:
            whole = layer.history.joined(0, layer.history.tokens)
            found += [whole.keys, whole.values]
    return found


def on_host(config: SessionConfig) -> SessionConfig:
    """The same policy with its history in host memory."""
    return config.replace(history={"device": "cpu"})
