"""The tables that `sfi-agent ablate` prints: all numbers, and long answers stretch by stretch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sfi_agent.cli.quantities import seconds_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["print_tables"]

_NAME_CHARACTERS = 16
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
    table = _table(place, rows, names)
    for row in rows:
        if not row["cases"]:
            table.add_row(row["policy"], f"{row['failed']} failed")
            continue
        cells = {
            "right": f"{row['right']}/{row['parts']}",
            "share": f"{row['share']:.3f}",
            "95 %": f"{row['share_low']:.2f}-{row['share_high']:.2f}",
            "slow": f"{row['slow_share']:.3f}",
            "accepted": "" if row["acceptance"] is None else f"{row['acceptance']:.2f}",
            "agrees": f"{row['agreed_share']:.2f}",
            "per token": seconds_text(row["seconds_per_token"]),
        }
        table.add_row(row["policy"], *(cells[name] for name in names))
    console.print(table)


def _print_stretches(console: Console, place: str, rows: list[Row]) -> None:
    """Policies by stretches; as many tables below each other as the width needs."""
    known = {
        row["policy"]: {stretch["first_token"]: stretch for stretch in row["stretches"] or ()}
        for row in rows
    }
    firsts = sorted({first for stretches in known.values() for first in stretches})
    cells = {
        policy: {first: _stretch_text(stretches.get(first)) for first in firsts}
        for policy, stretches in known.items()
    }
    widest = max(len(text) for texts in cells.values() for text in texts.values())
    names = min(_NAME_CHARACTERS, max(map(len, known)))
    fitting = max(1, (console.width - names - 3) // (widest + 1))
    console.print(f"{place}: {_ALONG}", soft_wrap=True)
    for some in _in_groups(firsts, fitting):
        table = _table(None, rows, [f"{first:,}" for first in some])
        for policy, texts in cells.items():
            table.add_row(policy, *(texts[first] for first in some))
        console.print(table)


def _stretch_text(stretch: Row | None) -> str:
    """`47/48 1.02`; the length is left out where it is not known or dense wrote nothing there."""
    if stretch is None:
        return ""
    text = f"{stretch['right']}/{stretch['parts']}"
    dense = stretch["dense_output_tokens"]
    return f"{text} {stretch['output_tokens'] / dense:.2f}" if dense else text


def _in_groups(items: list[int], most: int) -> Iterator[list[int]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _table(title: str | None, rows: list[Row], names: Iterable[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    longest = max(len(row["policy"]) for row in rows)
    table.add_column("policy", overflow="fold", min_width=min(_NAME_CHARACTERS, longest))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
