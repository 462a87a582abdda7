"""Tables of numbers that fit the terminal: columns that find no room stand in a table below."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["fitting_tables"]

_NAME_CELLS = 16
"""What is left of a long first column before other columns have to go below."""


def fitting_tables(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    left: Collection[str] = (),
    styles: Sequence[str | None] = (),
    last_apart: bool = False,
) -> Iterator[Table]:
    """One table where everything fits, else several; each has the first column and some others.

    Args:
        names: The headings; the first column says what a row is about, and folds.
        rows: The cells of each row, as many as there are headings.
        width: Cells that a table may take. A single column that needs more is cut off.
        left: Headings of further columns whose cells stand at the left.
        styles: A style per row; none for plain rows.
        last_apart: Whether an empty line stands before the last row.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for columns in _groups(names, rows, width):
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column(names[0], overflow="fold")
        for column in columns:
            name = names[column]
            table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
        for number, row in enumerate(rows):
            cells = (row[0], *(row[column] for column in columns))
            style = styles[number] if styles else None
            table.add_row(*cells, style=style, end_section=last_apart and number == len(rows) - 2)
        yield table


def _groups(
    names: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> Iterator[tuple[int, ...]]:
    """Numbers of the columns behind the first, table by table."""
    from rich.cells import cell_len

    first, *others = (max(map(cell_len, column)) for column in zip(names, *rows, strict=True))
    # Between two columns stand two spaces.
    if first + sum(needed + 2 for needed in others) > width:
        first = min(first, _NAME_CELLS)
    group: list[int] = []
    taken = first
    for column, needed in enumerate(others, start=1):
        if group and taken + needed + 2 > width:
            yield tuple(group)
            group, taken = [], first
        group.append(column)
        taken += needed + 2
    yield tuple(group)
