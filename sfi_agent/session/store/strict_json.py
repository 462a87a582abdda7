"""JSON that leaves no doubt: no key twice, no depth without end, nothing that is no number."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

__all__ = ["canonical", "compact", "parse"]

_DEEPEST = 128
"""Levels of lists and mappings. What comes out is walked by functions that call themselves."""

_MOST_KEYS = 1 << 14
"""Of one mapping. Looking for fields among many more takes long."""


def compact(value: object, *, finite: bool = True) -> str:
    """JSON without spaces, keys in their order, ASCII only.

    Args:
        value: Plain data.
        finite: Whether NaN and infinities are refused.

    Raises:
        ValueError, TypeError, RecursionError: It is no plain data.
    """
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=not finite)


def canonical(value: object) -> str:
    """As `compact` with sorted keys: equal if and only if the values are."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), sort_keys=True)


def parse(text: str, *, finite: bool = True) -> Any:
    """What a JSON text says.

    Args:
        text: From anywhere.
        finite: Whether NaN and infinities are refused. Arguments that a model wrote may have them.

    Raises:
        ValueError: It is no JSON, or has a key twice, too many keys or levels, or a number that is
            none.
    """
    try:
        if finite:
            value = json.loads(
                text,
                object_pairs_hook=_unique_keys,
                parse_constant=_refuse_constant,
                parse_float=_finite,
            )
        else:
            value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError("lists and mappings are nested too deeply") from error
    _check_depth(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MOST_KEYS:
        raise ValueError(f"a mapping of {len(pairs)} keys, of at most {_MOST_KEYS}")
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):  # Such as 1e999, which no constant names.
        raise ValueError(f"{number} is not a finite number"[:100])
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(_DEEPEST):
        level = [item for holder in level for item in _holders_in(holder)]
        if not level:
            return
    raise ValueError(f"lists and mappings are nested more than {_DEEPEST} deep")


def _holders_in(holder: list[Any] | dict[str, Any]) -> list[Any]:
    items = list(holder.values()) if isinstance(holder, dict) else holder
    if not {list, dict} & set(map(type, items)):
        return []  # Such as all the ids of a session, at once.
    return [item for item in items if isinstance(item, (list, dict))]
