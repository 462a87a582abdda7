"""Checks of plain arguments: integers that are integers, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable

from sfi_agent.errors import InputError, explain

__all__ = ["at_least", "integers", "positive_seconds"]


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
    found = list(given) if isinstance(given, Iterable) else [None]
    whole = [value for value in found if isinstance(value, int) and not isinstance(value, bool)]
    if len(whole) < len(found):
        raise InputError(
            explain(f"gave {name}", got=f"{name}={given!r}", allowed="a collection of integers")
        )
    return frozenset(whole)


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
