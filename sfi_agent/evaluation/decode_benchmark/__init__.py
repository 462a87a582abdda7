"""Whole decodings timed in one run over one history: dense, slow-fast, and plain transformers."""

from __future__ import annotations

from sfi_agent.evaluation.decode_benchmark.benchmark import benchmark_decode
from sfi_agent.evaluation.decode_benchmark.options import (
    ARMS,
    DEFAULT_ARMS,
    DecodeOptions,
    position_room,
)
from sfi_agent.evaluation.decode_benchmark.plot import plot_svg
from sfi_agent.evaluation.decode_benchmark.records import ArmTiming, DecodeBenchmark, WarmUpTimes
from sfi_agent.evaluation.decode_benchmark.sizes import ModelSizes

__all__ = [
    "ARMS",
    "DEFAULT_ARMS",
    "ArmTiming",
    "DecodeBenchmark",
    "DecodeOptions",
    "ModelSizes",
    "WarmUpTimes",
    "benchmark_decode",
    "plot_svg",
    "position_room",
]
