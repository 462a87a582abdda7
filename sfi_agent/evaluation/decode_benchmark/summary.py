"""From samples to the numbers that are reported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.evaluation.decode_benchmark.records import (
    ArmTiming,
    Bandwidth,
    DecodeBenchmark,
    DraftCounts,
)
from sfi_agent.evaluation.decode_benchmark.roof import Roof

if TYPE_CHECKING:
    from sfi_agent.evaluation.decode_benchmark.options import DecodeOptions
    from sfi_agent.evaluation.decode_benchmark.rounds import Measured
    from sfi_agent.evaluation.decode_benchmark.sample import Sample
    from sfi_agent.evaluation.decode_benchmark.setting import Setting

__all__ = ["summarize"]


def summarize(
    measured: Measured, setting: Setting, start_bytes: int, kernels: dict[str, Any] | None
) -> DecodeBenchmark:
    """All results of a run; `start_bytes` and `kernels` as in `DecodeBenchmark`."""
    copy = _bandwidth(measured.copy_buffer_bytes, measured.copies)
    bus = _bandwidth(measured.copy_buffer_bytes, measured.bus_copies) if setting.on_host else None
    sizes, options = setting.sizes, setting.options
    memory_tokens = _memory_tokens(measured, setting)
    roof = Roof(
        sizes,
        options.batch,
        setting.context_tokens,
        memory_tokens,
        setting.memory_tokens,
        len(setting.config.memory.dense_layers),
        setting.streamed_layers,
    )
    arms = _timings(measured, roof, copy, bus, options)
    return DecodeBenchmark(
        context_tokens=setting.context_tokens,
        batch=options.batch,
        memory_tokens=round(memory_tokens),
        segment_tokens=options.segment_tokens,
        verify_tokens=options.verify_tokens,
        acceptance=options.acceptance,
        device=str(setting.device),
        dtype=str(sizes.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        arms=arms,
        left_out=dict(measured.left_out),
        dense_over_fast=_ratio(arms, "dense", "fast"),
        slow_over_dense=_ratio(arms, "slow", "dense"),
        copy=copy,
        weight_bytes=sizes.weight_bytes,
        active_weight_bytes=sizes.read_weight_bytes(options.batch),
        history_bytes=measured.history_bytes,
        memory_bytes=measured.memory_bytes,
        peak_bytes=measured.peak_bytes,
        start_bytes=start_bytes,
        warmup=measured.warmup,
        kernels=kernels,
        host_bytes=measured.host_bytes,
        bus=bus,
    )


def _timings(
    measured: Measured,
    roof: Roof,
    copy: Bandwidth,
    bus: Bandwidth | None,
    options: DecodeOptions,
) -> dict[str, ArmTiming]:
    found = {}
    dense = measured.samples.get("dense")
    basis = _median(dense) if dense else None
    for name, samples in measured.samples.items():
        seconds = [sample.span.seconds for sample in samples]
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        on_device = [s.span.device_seconds for s in samples if s.span.device_seconds is not None]
        drafts = _drafts(samples)
        needed = roof.bytes_of(name, options.segment_tokens, drafts)
        roof_seconds = needed / copy.bytes_per_second
        brought = roof.bus_bytes_of(name, options.segment_tokens, drafts)
        if bus is not None:
            roof_seconds = max(roof_seconds, brought / bus.bytes_per_second)
        found[name] = ArmTiming(
            median_seconds=median,
            quartile_seconds=(first, third),
            rounds=len(samples),
            device_seconds=statistics.median(on_device) if on_device else None,
            tokens=statistics.fmean(sample.tokens for sample in samples),
            # A selection alone makes no token.
            tokens_per_second=0.0 if name == "selection" else options.batch / median,
            times_dense=median / basis if basis else None,
            roof_bytes=needed,
            roof_seconds=roof_seconds,
            share_of_roof=roof_seconds / median,
            drafts=drafts,
            bus_bytes=brought,
        )
    return found


def _bandwidth(buffer_bytes: int, copies: Sequence[float]) -> Bandwidth:
    first, median, third = statistics.quantiles(copies, n=4, method="inclusive")
    return Bandwidth(buffer_bytes, median, (first, third))


def _memory_tokens(measured: Measured, setting: Setting) -> float:
    """What fast steps attended to: as measured where one was timed."""
    for name in ("fast", "observe", "rectify", "verify"):
        seen = [s.memory_tokens for s in measured.samples.get(name, []) if s.memory_tokens]
        if seen:
            return statistics.fmean(seen)
    return float(setting.memory_tokens)


def _drafts(samples: Sequence[Sample]) -> DraftCounts | None:
    counted = [sample.drafts for sample in samples if sample.drafts is not None]
    total = DraftCounts()
    for counts in counted:
        total = total.plus(counts)
    return total if counted else None


def _median(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.span.seconds for sample in samples)


def _ratio(arms: dict[str, ArmTiming], over: str, under: str) -> float | None:
    if over not in arms or under not in arms:
        return None
    return arms[over].median_seconds / arms[under].median_seconds
