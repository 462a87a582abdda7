"""Events of a session as plain JSON data, for pages and endpoints that draw a session."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from sfi_agent.errors import InputError, explain
from sfi_agent.session.events import Event, TurnEnd

__all__ = ["event_to_json"]


def event_to_json(event: Event, *, steps: bool = False) -> dict[str, Any]:
    """One event as data that `json.dumps` takes and every JSON reader understands.

    `type` is the event's name in small letters (`text_delta`, `tool_call`, `turn_end`, ...), the
    other keys are the event's fields. A `turn_end` holds the fields of its reply. Numbers that JSON
    lacks become the strings "NaN", "Infinity" and "-Infinity"; what is no text in a string (lone
    surrogates) becomes "?". There is no way back: the events are for showing, ids are the truth.

    Args:
        event: Any event of `session.stream`.
        steps: Whether `turn_end` also has the records of its tokens; each came as a `step` before.

    Raises:
        InputError: It is no event, or holds something that is no data.
    """
    if not isinstance(event, get_args(Event)):
        allowed = "an event of session.stream"
        raise InputError(explain("Turn an event into JSON", got=repr(event), allowed=allowed))
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    if not isinstance(event, TurnEnd):
        return {"type": name, **_record(event)}
    return {"type": name, **_record(event.reply, without=() if steps else ("steps",))}


def _record(record: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    names = (item.name for item in fields(record))
    return {name: _plain(getattr(record, name)) for name in names if name not in without}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _record(value)
    if isinstance(value, Mapping):
        return {_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(
        explain("Turn an event into JSON", got=type(value).__name__, allowed="plain JSON data")
    )


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
