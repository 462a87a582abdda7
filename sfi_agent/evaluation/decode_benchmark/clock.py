"""Time between two moments, and the bandwidth of a copy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

__all__ = ["BusProbe", "Clock", "CopyProbe", "Moment", "Span"]

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_COPIES = {"cuda": 8, "cpu": 1}


@dataclass(frozen=True, slots=True)
class Moment:
    """When everything that counts was done.

    Attributes:
        seconds: By the clock on the wall.
        event: On the device's own time line; None on a CPU and where nobody waited for the device.
    """

    seconds: float
    event: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds between two moments; `device_seconds` is None without events."""

    seconds: float
    device_seconds: float | None

    def over(self, number: float) -> Span:
        """Divided by a number of steps."""
        device = None if self.device_seconds is None else self.device_seconds / number
        return Span(self.seconds / number, device)


class Clock:
    """Reads the time when a device has done what it was given.

    Args:
        device: Where steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Moment:
        """Wait for the device, then read both clocks."""
        if self._device.type != "cuda":
            return Moment(time.perf_counter(), None)
        torch.cuda.synchronize(self._device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return Moment(time.perf_counter(), event)

    def glance(self) -> Moment:
        """The clock on the wall, without waiting.

        For moments at which tokens have arrived: what they came from is done then, and the device
        may have begun a step that nobody counts.
        """
        return Moment(time.perf_counter(), None)

    def between(self, first: Moment, last: Moment) -> Span:
        """How long it took."""
        device = None
        if first.event is not None and last.event is not None:
            last.event.synchronize()
            device = float(first.event.elapsed_time(last.event)) / 1000.0
        return Span(last.seconds - first.seconds, device)


class CopyProbe:
    """Copies a buffer: the bandwidth that the roof is made of.

    Args:
        device: Whose memory.
        buffer_bytes: Size of the buffer; None takes 1 GiB on CUDA and 256 MiB on a CPU.
    """

    def __init__(self, device: torch.device, buffer_bytes: int | None) -> None:
        self.buffer_bytes = buffer_bytes or copy_bytes(device.type)
        self._copies = _COPIES.get(device.type, 1)
        self._clock = Clock(device)
        self._source = torch.ones(self.buffer_bytes // 4, device=device)
        self._target = torch.empty_like(self._source)

    def sample(self) -> float:
        """Bytes per second, read and written ones counted."""
        first = self._clock.now()
        for _ in range(self._copies):
            self._target.copy_(self._source)
        span = self._clock.between(first, self._clock.now())
        moved = 2 * self._source.nbytes * self._copies
        return moved / (span.device_seconds or span.seconds)


class BusProbe:
    """Copies pinned host memory to a device: the bandwidth that streaming a history has at most.

    Args:
        device: That copies to itself.
        buffer_bytes: As in `CopyProbe`.
    """

    def __init__(self, device: torch.device, buffer_bytes: int | None) -> None:
        self.buffer_bytes = buffer_bytes or copy_bytes(device.type)
        self._copies = _COPIES.get(device.type, 1)
        self._clock = Clock(device)
        pinned = device.type == "cuda"
        self._source = torch.ones(self.buffer_bytes // 4, pin_memory=pinned)
        self._target = torch.empty_like(self._source, device=device, pin_memory=False)

    def sample(self) -> float:
        """Bytes per second that arrive."""
        first = self._clock.now()
        for _ in range(self._copies):
            self._target.copy_(self._source, non_blocking=True)
        span = self._clock.between(first, self._clock.now())
        return self._source.nbytes * self._copies / (span.device_seconds or span.seconds)


def copy_bytes(device_type: str) -> int:
    """Size of the buffer that is copied on a kind of device."""
    return _COPY_BYTES.get(device_type, _COPY_BYTES["cpu"])
