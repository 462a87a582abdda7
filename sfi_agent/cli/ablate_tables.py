"""The tables that `sfi-agent ablate` prints: all numbers, and long answers stretch by stretch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfi_agent.cli.fitting_tables import fitting_tables
from sfi_agent.cli.quantities import seconds_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_tables"]

_ALONG = "right, and length against dense, by token of the right answer"

Row = dict[str, Any]
"""A row of `results.json`."""


def print_tables(console: Console, rows: list[Row]) -> None:
    """Print one table per task, context length, protocol and kind of answers; where answers are
    longer than one stretch, a second one along them."""
    for place, found in _by_place(rows).items():
        _print_numbers(console, place, found)
        if any(len(row["stretches"] or ()) > 1 for row in found):
            _print_stretches(console, place, found)


def _by_place(rows: list[Row]) -> dict[str, list[Row]]:
    places: dict[str, list[Row]] = {}
    for row in rows:
        place = f"{row['task']}, {row['context_tokens']:,} tokens, {row['protocol']}"
        if row["answers"] != "own":
            place += f", {row['answers']} answers"
        places.setdefault(place, []).append(row)
    return places


def _print_numbers(console: Console, place: str, rows: list[Row]) -> None:
    verified = any(row["acceptance"] is not None for row in rows)
    names = ["right", "share", "95 %", "slow", "accepted", "agrees", "per token"]
    if not verified:
        names.remove("accepted")
    cells = [(row["policy"], *_numbers(row, names)) for row in rows]
    _print_fitting(console, place, ["policy", *names], cells)


def _numbers(row: Row, names: list[str]) -> list[str]:
    """The cells of a row; of one without a finished run, how many failed."""
    if not row["cases"]:
        return [f"{row['failed']} failed", *("" for _ in names[1:])]
    cells = {
        "right": f"{row['right']}/{row['parts']}",
        "share": f"{row['share']:.3f}",
        "95 %": f"{row['share_low']:.2f}-{row['share_high']:.2f}",
        "slow": f"{row['slow_share']:.3f}",
        "accepted": "" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
        "agrees": f"{row['agreed_share']:.2f}",
        "per token": seconds_text(row["seconds_per_token"]),
    }
    return [cells[name] for name in names]


def _print_stretches(console: Console, place: str, rows: list[Row]) -> None:
    """Policies by stretches."""
    known = {
        row["policy"]: {stretch["first_token"]: stretch for stretch in row["stretches"] or ()}
        for row in rows
    }
    firsts = sorted({first for stretches in known.values() for first in stretches})
    cells = [
        (policy, *(_stretch_text(stretches.get(first)) for first in firsts))
        for policy, stretches in known.items()
    ]
    names = ["policy", *(f"{first:,}" for first in firsts)]
    _print_fitting(console, f"{place}: {_ALONG}", names, cells)


def _stretch_text(stretch: Row | None) -> str:
    """`47/48 1.02`; the length is left out where it is not known or dense wrote nothing there."""
    if stretch is None:
        return ""
    text = f"{stretch['right']}/{stretch['parts']}"
    dense = stretch["dense_output_tokens"]
    return f"{text} {stretch['output_tokens'] / dense:.2f}" if dense else text


def _print_fitting(
    console: Console, title: str, names: list[str], rows: list[tuple[str, ...]]
) -> None:
    console.print(title, style="italic", soft_wrap=True)
    for table in fitting_tables(names, rows, console.width):
        console.print()
        console.print(table)
    console.print()
