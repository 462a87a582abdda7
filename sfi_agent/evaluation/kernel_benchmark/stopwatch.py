"""Time of one arm: replays of a captured graph between device events, or the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Arm", "Stopwatch", "in_turn", "steps_per_pass"]

_LEAST_STEPS = 4
_SAMPLE_SECONDS = 0.008
_MOST_REPEATS = 2000


@dataclass(frozen=True, slots=True)
class Arm:
    """Something that is timed.

    Attributes:
        name: Unique within a workload.
        run: One pass: `operations` operations one after another. Returns what it computed.
        check: Runs it and compares with a reference; raises AssertionError with the difference.
        operations: How many the time is divided by.
        moved_bytes: What one operation has to read and write.
        unit: What one operation is: "layer", "all layers" or "buffer".
        queries: Queries per sequence; 0 where there are none.
        baseline: Name of the arm that does the same with torch alone; "" if there is none.
        cached: Whether reads may come from the cache, so that the share is flattered.
        method: Which implementation runs, in words.
        prepare: Runs before every pass and is not timed, where a pass uses up its input.
        captured: Whether passes are replayed from a graph, on a device that has them.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], None]
    operations: int
    moved_bytes: int
    unit: str
    queries: int = 0
    baseline: str = ""
    cached: bool = False
    method: str = ""
    prepare: Callable[[], Any] | None = None
    captured: bool = True


def steps_per_pass(buffers: int) -> int:
    """Each buffer as often, and enough steps that starting a graph does not count."""
    return buffers * -(-_LEAST_STEPS // buffers)


def in_turn(buffers: int, step: Callable[[int], Any]) -> Callable[[], None]:
    """One pass: steps on one buffer after another, as many as `steps_per_pass` says."""

    def run() -> None:
        for index in range(steps_per_pass(buffers)):
            step(index % buffers)

    return run


class Stopwatch:
    """Times one arm; building it compiles and captures.

    Args:
        arm: What to time.
        device: Where it runs; the current one, if it is a CUDA device.
    """

    def __init__(self, arm: Arm, device: torch.device) -> None:
        self.arm = arm
        self._on_cuda = device.type == "cuda"
        self._prepare = None if arm.prepare is None else self._ready(arm.prepare)
        self._run = self._ready(arm.run)
        self._repeats = 1
        if self._on_cuda:
            once = min(self._pass_seconds() for _ in range(3))
            self._repeats = max(1, min(_MOST_REPEATS, round(_SAMPLE_SECONDS / once)))

    def seconds(self) -> float:
        """Seconds of one operation: one sample."""
        return self._pass_seconds() / self.arm.operations

    def _ready(self, run: Callable[[], Any]) -> Callable[[], Any]:
        run()
        if not (self._on_cuda and self.arm.captured):
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        # Not replayed yet: a pass that uses up its input must not run twice on it.
        replay: Callable[[], None] = graph.replay
        return replay

    def _pass_seconds(self) -> float:
        """Seconds of one pass, mean over the repeats of a sample."""
        if self._prepare is None:
            return self._between(self._run, self._repeats)
        samples = []
        for _ in range(self._repeats):
            self._prepare()
            samples.append(self._between(self._run, 1))
        return statistics.fmean(samples)

    def _between(self, run: Callable[[], Any], repeats: int) -> float:
        if not self._on_cuda:
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - started) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000.0 / repeats
