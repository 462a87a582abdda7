"""The trace of a session as columns, which are a fraction of the size of its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.store.manifest import SavedTexts, SavedTrace

__all__ = ["columns_of", "records_of"]

_IDS = "token_id"
_RECORDS = TypeAdapter(tuple[StepRecord, ...])


def columns_of(trace: Sequence[StepRecord]) -> SavedTrace:
    """Records as columns; ids are left out, because they stand at their positions."""
    names = [field.name for field in fields(StepRecord) if field.name != _IDS]
    rows = map(attrgetter(*names), trace)
    columns: dict[str, Any] = dict(zip(names, zip(*rows, strict=True), strict=False))
    for name in names:
        values = columns.setdefault(name, ())
        if {str, type(None)} & set(map(type, values)):
            columns[name] = _texts(values)
    return SavedTrace(columns=columns)


def records_of(trace: SavedTrace, ids: Sequence[int]) -> list[StepRecord]:
    """The records again. Fields that did not exist when they were written have their defaults.

    Raises:
        ValueError: The columns are no records of these ids.
    """
    columns = {name: _values(column) for name, column in trace.columns.items()}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1 or _IDS in columns or "position" not in columns:
        raise ValueError("columns that do not make records")
    positions = columns["position"]
    if not all(isinstance(place, int) and 0 <= place < len(ids) for place in positions):
        raise ValueError("records of tokens that are not there")
    if any(low >= high for low, high in zip(positions, positions[1:], strict=False)):
        raise ValueError("records out of order")
    if any(isinstance(v, (int, float)) and v < 0 for c in columns.values() for v in c):
        raise ValueError("a record with a negative number")
    columns[_IDS] = [ids[place] for place in positions]
    unknown = set(columns) - {field.name for field in fields(StepRecord)}
    if unknown:
        raise ValueError(f"records with the field {min(unknown)!r}")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    try:
        return list(_RECORDS.validate_python(tuple(rows), strict=False))
    except ValidationError as error:
        raise ValueError(error.errors(include_url=False, include_input=False)[0]["msg"]) from error


def _texts(values: Sequence[str | None]) -> SavedTexts:
    distinct = tuple(dict.fromkeys(values))
    number = {text: index for index, text in enumerate(distinct)}
    return SavedTexts(texts=distinct, rows=tuple(number[value] for value in values))


def _values(column: SavedTexts | tuple[int | float | bool, ...]) -> Sequence[Any]:
    if not isinstance(column, SavedTexts):
        return column
    if any(row >= len(column.texts) for row in column.rows):
        raise ValueError("a row of a text that is not there")
    return [column.texts[row] for row in column.rows]
