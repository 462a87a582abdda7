"""Copies that run beside the computation, and how one waits for the other.

On a CUDA device a lane is a stream of its own and a mark is an event; nobody waits on the host
unless it asks to. On a CPU a copy is done when it was asked for, and marks have always passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CopyLane", "Mark", "make_lane"]


class Mark(Protocol):
    """A moment: of a lane, or of the computation."""

    def hold(self) -> None:
        """Let computation that is started from now on wait for this moment."""
        ...

    def hold_lane(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait for it."""
        ...

    def wait(self) -> None:
        """Let the host wait for it."""
        ...


class CopyLane(Protocol):
    """Where copies run, one after the other."""

    def note(self) -> Mark:
        """Where the computation is now: all that has been started so far."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Mark:
        """Start copies.

        Args:
            pairs: Target and source of each, contiguous and of one shape and dtype. Nobody frees
                them, writes the source or reads the target before the copy is done.
            after: What has to have happened before.

        Returns:
            When they are done.
        """
        ...


def make_lane(device: torch.device) -> CopyLane:
    """A lane between the host and a device."""
    return _StreamLane(device) if device.type == "cuda" else _InlineLane()


class _Passed:
    """The mark of what is done at once."""

    def hold(self) -> None:
        return None

    def hold_lane(self, stream: torch.cuda.Stream) -> None:
        return None

    def wait(self) -> None:
        return None


class _InlineLane:
    """Copies at once."""

    def note(self) -> Mark:
        return _Passed()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Mark:
        for target, source in pairs:
            target.copy_(source)
        return _Passed()


class _EventMark:
    """A CUDA event that has been recorded.

    Args:
        stream: Its moment is when everything that this stream has been given so far is done.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def hold(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def hold_lane(self, stream: torch.cuda.Stream) -> None:
        stream.wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


class _StreamLane:
    """A stream beside the one that computes.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def note(self) -> Mark:
        return _EventMark(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Mark:
        for mark in after:
            mark.hold_lane(self._stream)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return _EventMark(self._stream)
