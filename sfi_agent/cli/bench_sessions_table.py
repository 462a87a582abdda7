"""The tables of `sfi-agent bench sessions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfi_agent.cli.bench_table import machine_line, print_columns
from sfi_agent.cli.quantities import bytes_text, count_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.evaluation.session_benchmark import (
        SecondTurn,
        SessionBenchmark,
        Timing,
        TurnCost,
    )

__all__ = ["print_sessions"]

_QUICK = (
    "fork",
    "fork_policy",
    "fork_nested",
    "rewind_near",
    "rewind_far",
    "rewind_inside",
    "mark",
)
_DISK = ("save", "write", "save_again", "load_full", "load_sizes", "read")
_LOGITS = ("logits", "logits_full", "logits_sizes")
_MICROSECONDS_BELOW = 1e-4


def print_sessions(
    console: Console, shape: str, result: SessionBenchmark, machine: dict[str, Any]
) -> None:
    """Medians and quartiles, what was allocated and written, and whether targets were met."""
    console.print(machine_line(machine), style="dim")
    if result.long is not None:
        long = result.long
        console.print(
            f"\n{shape}, {long.dtype}, a session of {long.context_tokens:,} tokens "
            f"({long.generated_tokens:,} generated), {bytes_text(long.history_bytes)} of keys and "
            "values",
            style="bold",
        )
    if any(arm in result.times for arm in _QUICK):
        _print_quick(console, result)
    if result.save is not None:
        _print_disk(console, result)
    if result.second_turn is not None:
        _print_second_turn(console, result.second_turn, _verdict(result, "turn"))


def _print_quick(console: Console, result: SessionBenchmark) -> None:
    assert result.long is not None
    wanted = [target for name, target in result.targets.items() if name in _QUICK]
    heading = f"< {seconds_text(wanted[0].limit)}" if wanted else ""
    names = ("arm", "median", "quartiles", "tensors", "ids back", heading)
    rows = []
    for arm in _QUICK:
        if arm not in result.times:
            continue
        cost, rewind = result.forks.get(arm), result.long.rewinds.get(arm)
        taken = "" if cost is None else bytes_text(cost.tensor_bytes)
        back = "" if rewind is None else f"{rewind[0] - rewind[1]:,}"
        rows.append((arm, *_times(result.times[arm]), taken, back, _verdict(result, arm)))
    print_columns(console, names, rows)
    if (cost := result.forks.get("fork")) is not None:
        grown = cost.resident_bytes
        process = "" if grown is None else f"; the process grew by {bytes_text(max(0, grown))}"
        console.print(
            f"A fork reads the {cost.shared_tokens:,} tokens of its parent and allocated "
            f"{bytes_text(cost.tensor_bytes)} of tensors{process}."
        )
    if "rewind_inside" in result.long.rewinds:
        console.print(
            f"rewind_inside ends in a generated answer of {result.long.long_answer_tokens:,} "
            "tokens, near its end."
        )


def _print_disk(console: Console, result: SessionBenchmark) -> None:
    save, load, disk = result.save, result.load, result.disk
    assert save is not None and load is not None and disk is not None
    sizes = {
        "save": save.bytes_written,
        "write": save.bytes_written,
        "save_again": save.again_bytes_written,
        "load_full": load.bytes_read,
        "read": load.bytes_read,
    }
    rows = [
        (arm, *_times(result.times[arm]), bytes_text(sizes[arm]) if arm in sizes else "")
        for arm in (*_DISK, *_LOGITS)
    ]
    print_columns(console, ("arm", "median", "quartiles", "bytes"), rows)
    speed = save.bytes_written / result.times["write"].median_seconds
    where = f" ({disk.file_system})" if disk.file_system else ""
    console.print(
        f"A save is {save.share_of_write:.2f} times as fast as a plain write and fsync of the same "
        f"bytes, {bytes_text(speed)}/s in {disk.directory}{where}. At least "
        f"{result.targets['save'].limit:g}: {_verdict(result, 'save')}."
    )
    console.print(
        f"After {count_text(save.more_tokens, 'more token')} a save wrote "
        f"{bytes_text(save.again_bytes_written)} of {bytes_text(save.again_bytes_total)}."
    )
    source = "from the disk" if load.from_disk else "from the disk, or from memory"
    same = (
        "those from before, bit for bit"
        if load.logits_difference == 0
        else f"{load.logits_difference:.1e} of the largest one away from those from before"
    )
    console.print(
        f"Loads and reads came {source}; load_full is {load.share_of_read:.2f} times as fast as "
        f"a plain read. The first step behind a load brings the files into memory. The next "
        f"token's logits are {same}."
    )
    if result.long_turn is not None:
        console.print(
            f"A turn behind this session {_found(result.long_turn)}. Only new ones: "
            f"{_verdict(result, 'long_turn')}."
        )


def _print_second_turn(console: Console, second: SecondTurn, verdict: str) -> None:
    console.print(
        f"\n{second.model}, turn 2 behind a first prompt of {second.prompt_tokens:,} tokens, "
        f"{count_text(second.threads, 'thread')}",
        style="bold",
    )
    if second.reason:
        console.print(f"Not behind {second.asked_tokens:,} tokens: {second.reason}.")
    rows = [
        (name, *_times(cost.first_token), seconds_text(cost.whole.median_seconds), tokens)
        for name, cost in (("turn 2", second.turn), ("anew", second.anew))
        for tokens in [f"{cost.usage.prefilled_tokens:,} of {cost.usage.prompt_tokens:,}"]
    ]
    print_columns(console, ("arm", "first token", "quartiles", "whole turn", "processed"), rows)
    console.print(f"Turn 2 {_found(second.turn)}. Only new ones: {verdict}.")
    console.print(
        f"Its first token came {second.times_faster:.1f} times as soon as when everything was "
        f"processed anew. Turn 1 took {seconds_text(second.first_turn_seconds)}."
    )


def _found(cost: TurnCost) -> str:
    """What a turn found in the history, and what it had to process."""
    usage = cost.usage
    lost = f" ({usage.reuse_lost_reason})" if usage.reuse_lost_reason else ""
    return (
        f"found {usage.cached_tokens:,} tokens in the history and prefilled "
        f"{usage.prefilled_tokens:,}; {cost.new_tokens:,} were new{lost}"
    )


def _times(timing: Timing) -> tuple[str, str]:
    """Median and quartiles, the unit once where it is the same."""
    low, high = (_duration(seconds) for seconds in timing.quartile_seconds)
    number, _, unit = low.partition(" ")
    span = f"{number} - {high}" if high.endswith(f" {unit}") else f"{low} - {high}"
    return _duration(timing.median_seconds), span


def _duration(seconds: float) -> str:
    """Seconds, milliseconds, or microseconds below a tenth of one."""
    if seconds < _MICROSECONDS_BELOW:
        return f"{seconds * 1e6:.3g} us"
    return seconds_text(seconds)


def _verdict(result: SessionBenchmark, arm: str) -> str:
    """Whether a target was reached; "" without one."""
    target = result.targets.get(arm)
    if target is None:
        return ""
    return "met" if target.met else "missed"
