"""Checks of plain arguments: integers that are integers, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable

from sfi_agent.errors import InputError, explain

__all__ = ["at_least", "integers"]


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
