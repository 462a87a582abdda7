"""Checks of plain arguments: integers that are integers, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from sfi_agent.errors import InputError, explain

__all__ = ["at_least", "integers", "one_each", "positive_seconds"]


def at_least(name: str, given: object, least: int) -> int:
    """The argument, if it is an integer of at least `least`.

    Raises:
        InputError: It is not.
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise InputError(
            explain(
                f"gave {name}", got=f"{name}={given!r}", allowed=f"an integer of at least {least}"
            )
        )
    return given


def integers(name: str, given: object) -> frozenset[int]:
    """The argument as a set, if it is a collection of integers.

    Raises:
        InputError: It is not.
    """
    found: list[object] = [None]
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        with suppress(TypeError):  # A tensor without dimensions says only then that it is none.
            found = list(given)
    whole = [value for value in found if isinstance(value, int) and not isinstance(value, bool)]
    if len(whole) < len(found):
        raise InputError(
            explain(f"gave {name}", got=f"{name}={given!r}", allowed="a collection of integers")
        )
    return frozenset(whole)


def one_each(name: str, given: Any, count: int, of: str) -> list[Any]:
    """The argument as a list, if it has one value for each of `count`.

    Args:
        name: What was given, and to whom.
        given: A list, a tuple, or anything that has a length and an order.
        count: How many there should be.
        of: What there is one value for, in the plural.

    Raises:
        InputError: It has fewer or more, or is no list.
    """
    try:
        length = None if isinstance(given, (str, bytes)) else len(given)
    except TypeError:
        length = None
    if length != count:
        got = repr(given) if length is None else f"{length} of them"
        raise InputError(explain(f"gave {name}", got=got, allowed=f"one for each of {count} {of}"))
    return list(given)


def positive_seconds(name: str, given: object) -> float | None:
    """The argument, if it is a time above 0 or None.

    Raises:
        InputError: It is not.
    """
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if given is not None and not (number and float(given) > 0):  # type: ignore[arg-type]
        raise InputError(
            explain(f"gave {name}", got=f"{name}={given!r}", allowed="seconds above 0, or None")
        )
    return given  # type: ignore[return-value]
