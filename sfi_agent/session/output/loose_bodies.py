"""Bodies of tool calls in notations that are nearly JSON."""

from __future__ import annotations

from typing import Literal

from sfi_agent.session.output.loose_values import LooseReader, LooseSyntaxError, UnterminatedString
from sfi_agent.session.output.tool_calls import (
    CUT_OFF,
    BodyReader,
    BodyStatus,
    RawCall,
    Schemas,
    unreadable_call,
)

__all__ = ["braced_calls", "braced_status", "python_calls", "python_status"]


def braced_calls(delimiter: str) -> BodyReader:
    """Reads `call:name{key:value, ...}` whose strings stand between delimiters."""

    def read(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
        text = body.strip()
        reader, name = LooseReader(text, delimiter), ""
        try:
            reader.take("call:")
            name = reader.name()
            reader.expect("{")
            arguments = reader.pairs(":", "}")
            if not reader.at_end:
                raise LooseSyntaxError(f"text behind it at character {reader.position}")
        except ValueError as error:
            return [unreadable_call(text, str(error) if closed else CUT_OFF, name)]
        return [RawCall(name, text, arguments)]

    return read


def braced_status(delimiter: str) -> BodyStatus:
    """See `BodyStatus`: open between two delimiters."""
    return lambda body: "open" if body.count(delimiter) % 2 else "whole"


def python_calls(body: str, closed: bool, schemas: Schemas) -> list[RawCall]:
    """`[name(key=value, ...), ...]` in Python's notation."""
    text = body.strip()
    calls: list[RawCall] = []
    reader = LooseReader(text)
    name, start = "", 0
    try:
        bracket = reader.take("[")
        while not (bracket and reader.take("]")) and not reader.at_end:
            start, name = reader.position, ""
            name = reader.name()
            reader.expect("(")
            arguments = reader.pairs("=", ")")
            calls.append(RawCall(name, text[start : reader.position].strip(), arguments))
            start, name = reader.position, ""
            reader.take(",")
        if not reader.at_end:
            raise LooseSyntaxError(f"text behind the calls at character {reader.position}")
    except ValueError as error:
        cut = isinstance(error, UnterminatedString) and not closed
        return [*calls, unreadable_call(text[start:], CUT_OFF if cut else str(error), name)]
    return calls or [unreadable_call(text, "it is empty")]


def python_status(body: str) -> Literal["whole", "open", "broken"]:
    """See `BodyStatus`."""
    (*_, last) = python_calls(body, True, {})
    if last.error is None:
        return "whole"
    return "open" if last.error == "a string is not closed" else "broken"
