"""Time the step kernels alone, beside torch and a plain copy, in one run.

Arms of one context length and batch alternate, so that drift of the machine hits all alike;
medians and quartiles are reported, and shares are of the copy in the same rounds.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from sfi_agent.engine.kernels import kernel_problem, uses_kernels
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.kernel_benchmark.arms import make_arms, make_copy
from sfi_agent.evaluation.kernel_benchmark.buffers import Buffers
from sfi_agent.evaluation.kernel_benchmark.checks import check_arms
from sfi_agent.evaluation.kernel_benchmark.linear_arms import make_linear_arms
from sfi_agent.evaluation.kernel_benchmark.records import (
    DeviceFacts,
    KernelBenchmark,
    KernelTiming,
    LeftOut,
)
from sfi_agent.evaluation.kernel_benchmark.stopwatch import Arm, Stopwatch
from sfi_agent.evaluation.kernel_benchmark.workload import KernelShape, Workload

__all__ = ["benchmark_kernels", "check_kernels", "refuse_without_kernels"]

_COPY_BYTES = 1 << 30
_LEAST_COPY_BYTES = 1 << 28
_WORKING_BYTES = 1 << 30
"""For what compiled kernels, graphs and the check before the measurement take."""

_CHECKED_TOKENS = 2000
_CHECKED_LAYERS = 2

Say = Callable[[str], None]


def _silent(_: str) -> None:
    return None


def refuse_without_kernels(device: torch.device, shape: KernelShape) -> None:
    """Refuse where the kernels would be replaced by their reference.

    Raises:
        InputError: With the reason; nothing was built.
    """
    problem: str | None = "no CUDA device: what would be timed is the plain reference on a CPU"
    if device.type == "cuda":
        problem = kernel_problem(device, shape.dtype, shape.head_size, shape.head_size)
    if problem is not None:
        raise InputError(
            explain(
                "benchmarked the step kernels",
                got=problem,
                allowed="an NVIDIA device of compute capability 8.0 or newer, with Triton",
                remedy="`sfi-agent bench decode` times whole steps on any device",
            )
        )


def benchmark_kernels(
    shape: KernelShape,
    contexts: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    *,
    rounds: int = 15,
    copy_bytes: int = _COPY_BYTES,
    on_stage: Say = _silent,
    on_progress: Say = _silent,
) -> KernelBenchmark:
    """Check every arm, then time it, at every context length and batch.

    On a CPU the reference runs and no graph is captured, which is for tests: `facts.kernels` says
    so, and the command refuses (`refuse_without_kernels`).

    Args:
        shape: Of the model.
        contexts: Lengths of the histories, tokens.
        batches: Sequences per step.
        device: Where to run.
        rounds: Samples per arm, at least 2, after one that is not counted.
        copy_bytes: Size of the buffer that is copied; smaller where memory is short, not below
            256 MiB.
        on_stage: Told what begins.
        on_progress: Told how far it is.

    Raises:
        InputError: Numbers without meaning, or a workload that does not fit the device's free
            memory; nothing was allocated.
        SfiError: An arm computes something else than its reference; nothing was timed.
    """
    shape.check(tuple(contexts), tuple(batches))
    if rounds < 2:
        got = f"{rounds} rounds"
        raise InputError(explain("benchmarked the step kernels", got=got, allowed="2 or more"))
    facts = _facts(device, shape)
    free = _free_bytes(device)
    workloads = [
        _fitting(Workload(shape, context, batch, facts.cache_bytes, copy_bytes), free)
        for context in contexts
        for batch in batches
    ]
    checked: list[str] = []
    timings: list[KernelTiming] = []
    for workload in workloads:
        _release(device)
        title = f"{workload.context_tokens:,} tokens x {workload.batch}"
        on_stage(f"Compiling and checking kernels for {title}")
        found = check_kernels(workload, device, on_progress)
        _release(device)
        checked += [name for name in found if name not in checked]
        on_stage(f"Timing kernels for {title}")
        timings += _time(workload, device, rounds, on_progress)
    return KernelBenchmark(shape, facts, tuple(checked), tuple(timings), _left_out(workloads))


def check_kernels(
    workload: Workload, device: torch.device, on_progress: Say = _silent
) -> tuple[str, ...]:
    """Compare every arm with its reference, on fewer layers and shorter histories.

    The plans, and the capacity that evidence is ranked in, are those of the workload, so these
    are the kernels that are timed; for batches that are multiples of 16 selection and gather are
    compiled once more, for aligned counts. Sequences differ in length.

    Returns:
        Names of the arms, all of them right.

    Raises:
        SfiError: One is wrong.
    """
    shape = workload.shape
    small = replace(shape, layers=min(shape.layers, _CHECKED_LAYERS))
    batch = min(workload.batch, 2)
    most = min(workload.context_tokens, shape.memory_tokens + _CHECKED_TOKENS)
    least = (most + shape.memory_tokens) // 2
    ranked = (workload.context_tokens, 1 + workload.context_tokens // 3)
    # With a cache of any size every layer gets buffers of its own.
    reduced = Workload(small, most, batch, cache_bytes=1 << 62, copy_bytes=1 << 20)
    with _current(device):
        buffers = Buffers(reduced, device, (most, least)[:batch], ranked[:batch])
        arms = [make_copy(reduced, device), *make_arms(buffers, planned=workload)]
        # Their sizes and rows are those that are timed, on fewer copies of the weights.
        arms += make_linear_arms(workload, device, most_copies=_CHECKED_LAYERS)
        return check_arms(arms, on_progress)


def _time(
    workload: Workload, device: torch.device, rounds: int, on_progress: Say
) -> list[KernelTiming]:
    on_progress("filling the histories")
    with _current(device):
        buffers = Buffers(workload, device)
        arms = [make_copy(workload, device), *make_arms(buffers, planned=workload)]
        arms += make_linear_arms(workload, device)
        watches = []
        for arm in arms:
            on_progress(f"capturing {arm.name}")
            watches.append(Stopwatch(arm, device))
        samples: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for index in range(rounds + 1):
            on_progress(f"round {index} of {rounds}")
            for watch in watches:
                seconds = watch.seconds()
                if index:
                    samples[watch.arm.name].append(seconds)
    return [_timing(arm, workload, samples, arms[0]) for arm in arms]


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Kernels and graphs go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _timing(
    arm: Arm, workload: Workload, samples: dict[str, list[float]], copy: Arm
) -> KernelTiming:
    seconds = samples[arm.name]
    first, median, third = (
        1e6 * value for value in statistics.quantiles(seconds, n=4, method="inclusive")
    )
    copy_speed = copy.moved_bytes / statistics.median(samples[copy.name])
    ratio = None
    if arm.baseline:
        ratio = statistics.median(seconds) / statistics.median(samples[arm.baseline])
    return KernelTiming(
        arm=arm.name,
        context_tokens=workload.context_tokens,
        batch=workload.batch,
        queries=arm.queries,
        unit=arm.unit,
        method=arm.method,
        median_microseconds=median,
        quartile_microseconds=(first, third),
        rounds=len(seconds),
        moved_bytes=arm.moved_bytes,
        copy_share=arm.moved_bytes / statistics.median(seconds) / copy_speed,
        cached=arm.cached,
        torch_ratio=ratio,
    )


def _left_out(workloads: Sequence[Workload]) -> tuple[LeftOut, ...]:
    reasons = {workload.batch: workload.linear_problem for workload in workloads}
    return tuple(LeftOut("linear", batch, why) for batch, why in reasons.items() if why is not None)


def _fitting(workload: Workload, free_bytes: int | None) -> Workload:
    """The workload, its copy made smaller where memory is short; refused if that is not enough."""
    if free_bytes is None:
        return workload
    needed = sum(replace(workload, copy_bytes=0).needed_bytes().values()) + _WORKING_BYTES
    spare = max(0, free_bytes - needed) // 2
    copy_bytes = min(workload.copy_bytes, spare)
    if copy_bytes >= min(workload.copy_bytes, _LEAST_COPY_BYTES):
        return replace(workload, copy_bytes=copy_bytes // 4096 * 4096)
    parts = replace(workload, copy_bytes=_LEAST_COPY_BYTES).needed_bytes()
    parts["working space"] = _WORKING_BYTES
    shown = ", ".join(f"{name} {size:,}" for name, size in parts.items())
    raise InputError(
        explain(
            f"benchmarked the step kernels at {workload.context_tokens:,} tokens x "
            f"{workload.batch}",
            got=f"{sum(parts.values()):,} bytes needed ({shown})",
            allowed=f"{free_bytes:,} bytes, which are free on the device",
            remedy="Take a shorter context, a smaller batch or fewer layers",
        )
    )


def _free_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _release(device: torch.device) -> None:
    """Give back what is no longer used: graphs and buffers of before hold much memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _facts(device: torch.device, shape: KernelShape) -> DeviceFacts:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    kernels = uses_kernels(device, shape.dtype, shape.head_size, shape.head_size)
    name, cache, memory = "CPU", 0, 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        cache = properties.L2_cache_size
    return DeviceFacts(
        device=str(device),
        device_name=name,
        cache_bytes=cache,
        memory_bytes=memory,
        kernels="triton" if kernels else "reference",
        torch=torch.__version__,
        triton=triton,
        cuda=torch.version.cuda,
    )
