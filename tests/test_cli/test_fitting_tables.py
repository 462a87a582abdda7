"""Tables that fit a terminal: nothing is cut off, and every cell stands below its heading."""

from __future__ import annotations

import io
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sfi_agent.cli.fitting_tables import fitting_tables

CELLS = st.text("0123456789./", min_size=0, max_size=9)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    columns, rows = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    names = ["policy", *(f"h{number}" for number in range(columns))]
    cells = [
        [f"p{row}" + "o" * draw(st.integers(0, 30)), *(draw(CELLS) for _ in range(columns))]
        for row in range(rows)
    ]
    return names, cells


def printed(
    names: list[str], rows: list[list[str]], width: int, *, last_apart: bool = False
) -> list[list[str]]:
    """The lines of each table."""
    found = []
    for table in fitting_tables(names, rows, width, last_apart=last_apart):
        file = io.StringIO()
        Console(file=file, width=width).print(table)
        found.append(file.getvalue().splitlines())
    return found


@given(tables(), st.integers(30, 120))
def test_every_cell_is_shown_whole_and_no_line_is_too_wide(
    table: tuple[list[str], list[list[str]]], width: int
) -> None:
    names, rows = table
    seen: dict[str, list[str]] = {}
    for lines in printed(names, rows, width):
        assert all(len(line) <= width for line in lines)
        assert not any("…" in line for line in lines)
        first, *others = lines[0].split()
        assert first == "policy"
        ends = [match.end() for match in re.finditer(r"\S+", lines[0])][1:]
        starts = [line for line in lines[2:] if line.startswith("p")]
        assert len(starts) == len(rows), "each row begins with its name"
        for name, end in zip(others, ends, strict=True):
            seen[name] = [(line[:end].split(" ") or [""])[-1] for line in starts]
        # A name that is folded goes on in the lines below.
        names_column = "".join(line[: ends[0]].split(" ")[0] for line in lines[2:])
        assert names_column == "".join(row[0] for row in rows)
    assert list(seen) == names[1:], "each column once, in order"
    for column, name in enumerate(names[1:], start=1):
        assert seen[name] == [row[column] for row in rows]


@given(tables())
def test_what_fits_is_one_table(table: tuple[list[str], list[list[str]]]) -> None:
    names, rows = table
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    needed = sum(widths) + 2 * (len(widths) - 1)
    assert len(printed(names, rows, needed)) == 1


def test_the_last_row_may_stand_apart() -> None:
    rows = [["a", "1"], ["b", "2"], ["all", "3"]]
    (lines,) = printed(["turn", "tokens"], rows, 40, last_apart=True)
    assert [line.split()[:1] for line in lines[2:]] == [["a"], ["b"], [], ["all"]]
