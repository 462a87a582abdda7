"""The step kernels alone: attention, selection and gather beside torch and a plain copy."""

from __future__ import annotations

from sfi_agent.evaluation.kernel_benchmark.benchmark import (
    benchmark_kernels,
    check_kernels,
    refuse_without_kernels,
)
from sfi_agent.evaluation.kernel_benchmark.records import (
    DeviceFacts,
    KernelBenchmark,
    KernelTiming,
)
from sfi_agent.evaluation.kernel_benchmark.workload import KernelShape, Workload

__all__ = [
    "DeviceFacts",
    "KernelBenchmark",
    "KernelShape",
    "KernelTiming",
    "Workload",
    "benchmark_kernels",
    "check_kernels",
    "refuse_without_kernels",
]
