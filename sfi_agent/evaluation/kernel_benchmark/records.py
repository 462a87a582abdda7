"""What a benchmark of the step kernels found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sfi_agent.evaluation.kernel_benchmark.workload import KernelShape

__all__ = ["DeviceFacts", "KernelBenchmark", "KernelTiming", "LeftOut"]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Where it was measured.

    Attributes:
        device: Name of the device as torch has it.
        device_name: The card.
        cache_bytes: Its last cache; 0 on a CPU.
        memory_bytes: Its memory; 0 on a CPU.
        kernels: "triton", or "reference" where they cannot run: such times say nothing.
        torch: Version.
        triton: Version; None where it is not installed.
        cuda: Version torch was built for; None without.
    """

    device: str
    device_name: str
    cache_bytes: int
    memory_bytes: int
    kernels: str
    torch: str
    triton: str | None
    cuda: str | None


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """One arm at one context length and batch.

    Attributes:
        arm: "copy", "fast", "dense", "dense_evidence", "block_16", "block_16_evidence", "rank",
            "rank_float16", "select", "gather", "linear_qkv", "linear_out", "linear_gated",
            "linear_down", "linear_head"; with "_torch" behind it the baseline.
        context_tokens: Length of the histories.
        batch: Sequences per step.
        queries: Queries per sequence; 0 where there are none.
        unit: What the times are of: one "layer", "all layers", or one "buffer" of the copy.
        method: What ran.
        median_microseconds: Median over the rounds; lower is better.
        quartile_microseconds: First and third quartile.
        rounds: Samples; each is a mean over replays that together take some milliseconds.
        moved_bytes: What has to be read and written once for one unit.
        copy_share: Bytes per second as a share of those of the copy in the same rounds; higher
            is better, 1 is the speed of a copy.
        cached: Whether the inputs are so small that they may come from the cache, which makes
            the share look better than it is.
        torch_ratio: Time over that of torch's attention or linear layers in the same rounds; lower
            is better. None where there is no such baseline.
    """

    arm: str
    context_tokens: int
    batch: int
    queries: int
    unit: str
    method: str
    median_microseconds: float
    quartile_microseconds: tuple[float, float]
    rounds: int
    moved_bytes: int
    copy_share: float
    cached: bool
    torch_ratio: float | None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Arms that one batch has no times of.

    Attributes:
        arms: The beginning of their names.
        batch: Sequences per step.
        reason: Why they were not measured.
    """

    arms: str
    batch: int
    reason: str


@dataclass(frozen=True, slots=True)
class KernelBenchmark:
    """Result of `benchmark_kernels`; JSON by `as_json()`.

    Attributes:
        shape: Whose attention and linear layers they were.
        facts: Where.
        checked: Arms whose results equalled their reference before anything was timed.
        timings: By context, batch and arm, in the order they were asked for.
        left_out: What was not measured, by batch.
    """

    shape: KernelShape
    facts: DeviceFacts
    checked: tuple[str, ...]
    timings: tuple[KernelTiming, ...]
    left_out: tuple[LeftOut, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "shape": {
                **asdict(self.shape),
                "dtype": self.shape.dtype_name,
                "selected_tokens": self.shape.selected_tokens,
            },
            "machine": asdict(self.facts),
            "checked": list(self.checked),
            "timings": [asdict(timing) for timing in self.timings],
            "left_out": [asdict(one) for one in self.left_out],
        }
