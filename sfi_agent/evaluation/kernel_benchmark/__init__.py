"""The step kernels alone: attention, selection and linear layers beside torch and a copy."""

from __future__ import annotations

from sfi_agent.evaluation.kernel_benchmark.benchmark import (
    benchmark_kernels,
    check_kernels,
    refuse_without_kernels,
)
from sfi_agent.evaluation.kernel_benchmark.linear_sizes import LinearSizes
from sfi_agent.evaluation.kernel_benchmark.records import (
    DeviceFacts,
    KernelBenchmark,
    KernelTiming,
    LeftOut,
)
from sfi_agent.evaluation.kernel_benchmark.workload import KernelShape, Workload

__all__ = [
    "DeviceFacts",
    "KernelBenchmark",
    "KernelShape",
    "KernelTiming",
    "LeftOut",
    "LinearSizes",
    "Workload",
    "benchmark_kernels",
    "check_kernels",
    "refuse_without_kernels",
]
