"""The table of `sfi-agent bench decode`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.cli.fitting_tables import fitting_tables
from sfi_agent.cli.quantities import bytes_text, count_text, seconds_text, share_text

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.evaluation.decode_benchmark import ArmTiming, DecodeBenchmark

__all__ = ["machine_line", "print_columns", "print_decode"]

_COLUMNS = ("arm", "per token", "quartiles", "device", "x dense", "roof", "of roof")
"""Together narrow enough for 80 columns."""


def print_decode(
    console: Console, shape: str, result: DecodeBenchmark, machine: dict[str, Any]
) -> None:
    """Medians, quartiles, ratios and shares, and what they rest on."""
    batch = "" if result.batch == 1 else f" x {result.batch}"
    console.print(
        f"{shape}, {result.dtype}, history of {result.context_tokens:,} tokens{batch}, fast steps "
        f"read {result.memory_tokens:,}",
        style="bold",
    )
    console.print(machine_line(machine), style="dim")
    print_columns(console, *_columns(result))
    rounds = max(arm.rounds for arm in result.arms.values())
    console.print(f"Medians of {rounds} samples, taken in turns; per token of each sequence.")
    for name, arm in result.arms.items():
        if arm.drafts is not None and arm.drafts.acceptance is not None:
            per_step = arm.drafts.drafted / arm.drafts.verifications
            console.print(
                f"{name}: {share_text(arm.drafts.acceptance)} of the judged drafts stand, "
                f"{per_step:.1f} drafts per verifying step."
            )
    for name, reason in result.left_out.items():
        console.print(f"{name} was left out: {reason}")
    if result.dense_over_fast is not None:
        console.print(f"A fast step is {result.dense_over_fast:.1f} times as fast as a dense one.")
    _print_bytes(console, result)


def machine_line(machine: dict[str, Any]) -> str:
    """Device and versions, from `machine_facts`."""
    versions = [
        f"{name} {machine[key]}"
        for name, key in (("Triton", "triton"), ("CUDA", "cuda"), ("transformers", "transformers"))
        if machine[key]
    ]
    return (
        f"{machine['device_name']}, {machine['device']}, "
        f"{count_text(machine['threads'], 'thread')}, torch {machine['torch']}, "
        f"{''.join(f'{text}, ' for text in versions)}Python {machine['python']}"
    )


def print_columns(
    console: Console,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[str] = (),
) -> None:
    """A table with an empty line above and below, or several where the terminal is narrow."""
    for table in fitting_tables(names, rows, console.width, left=left):
        console.print()
        console.print(table)
    console.print()


def _columns(result: DecodeBenchmark) -> tuple[list[str], list[list[str]]]:
    on_device = any(arm.device_seconds is not None for arm in result.arms.values())
    names = [name for name in _COLUMNS if name != "device" or on_device]
    cells = [_cells(name, arm) for name, arm in result.arms.items()]
    return names, [[row[name] for name in names] for row in cells]


def _cells(name: str, arm: ArmTiming) -> dict[str, str]:
    low, high = arm.quartile_seconds
    device = "" if arm.device_seconds is None else seconds_text(arm.device_seconds)
    return {
        "arm": name,
        "per token": seconds_text(arm.median_seconds),
        "quartiles": _range_text(low, high),
        "device": device,
        "x dense": "" if arm.times_dense is None else f"{arm.times_dense:.2f}",
        "roof": seconds_text(arm.roof_seconds),
        "of roof": share_text(arm.share_of_roof),
    }


def _range_text(low: float, high: float) -> str:
    """Two times, the unit once where it is the same: "1.23 - 1.36 ms"."""
    first, last = seconds_text(low), seconds_text(high)
    number, _, unit = first.partition(" ")
    return f"{number} - {last}" if last.endswith(f" {unit}") else f"{first} - {last}"


def _print_bytes(console: Console, result: DecodeBenchmark) -> None:
    copy, warmup = result.copy, result.warmup
    console.print(
        f"The roof: bytes of weights, keys and values over the speed of a copy of "
        f"{bytes_text(copy.buffer_bytes)}, {bytes_text(copy.bytes_per_second)}/s read and written."
    )
    console.print(
        f"Bytes: weights {bytes_text(result.weight_bytes)}, history "
        f"{bytes_text(result.history_bytes)}, memory {bytes_text(result.memory_bytes)}; "
        f"peak {result.peak_over_needed:.2f} times their sum."
    )
    if result.bus is not None:
        console.print(
            f"In host memory: {bytes_text(result.host_bytes)} of the histories, which that sum "
            f"leaves out. A copy from there runs at {bytes_text(result.bus.bytes_per_second)}/s; "
            "where that takes longer for what a step brings, it is the roof."
        )
    prepared = [
        word
        for word, true in (("compiled", warmup.compiled), ("captured", warmup.captured))
        if true
    ]
    said = " and ".join(prepared) or "eager"
    reason = f" ({warmup.reason})" if warmup.reason else ""
    console.print(f"Steps are {said}{reason}; warm-up {seconds_text(warmup.seconds)}.")
