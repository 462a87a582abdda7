"""Regular expressions of JSON schemas in the form that grammars take: for whole texts, and without
characters that the notation of the text does not let in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

__all__ = ["CONTROLS", "barred_class", "whole_pattern"]

CONTROLS = "".join(map(chr, range(32)))
_LAST = 0x10FFFF
_Ranges = list[tuple[int, int]]

_DIGITS: _Ranges = [(48, 57)]
_WORDS: _Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACES: _Ranges = [
    *((9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
]
_CLASSES = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_CONTROL_ESCAPES = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "0": 0}
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
_QUANTIFIER = re.compile(r"([*+?]|\{\d+(?:,\d*)?\})\??")
_GROUP = re.compile(r"\((?:\?:|\?P<[^>]*>|(?!\?))")


class _NotHeld(Exception):
    """The pattern has something that grammars cannot say."""


def whole_pattern(pattern: str, barred: str) -> str | None:
    """A pattern that a whole text matches where some part of it matches the given one.

    Args:
        pattern: As JSON schema has it: anchored only where it says so.
        barred: Characters that the text must not hold.

    Returns:
        None where a grammar cannot say it: looking around, references back, flags, word boundaries,
        classes of Unicode, anchors in the middle, and characters that are barred.
    """
    try:
        return "|".join(_Scanner(part, barred).whole() for part in _alternatives(pattern))
    except (_NotHeld, IndexError):
        return None


def barred_class(barred: Iterable[str]) -> str:
    """A class of all characters but these."""
    return _written(_without([(0, _LAST)], [(ord(letter), ord(letter)) for letter in barred]))


def _alternatives(pattern: str) -> Iterator[str]:
    """What stands between the `|` that are in no group."""
    depth, start, index, in_class = 0, 0, 0, False
    while index < len(pattern):
        letter = pattern[index]
        if letter == "\\":
            index += 1
        elif in_class:
            in_class = letter != "]"
        elif letter == "[":
            in_class = True
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and not depth:
            yield pattern[start:index]
            start = index + 1
        index += 1
    yield pattern[start:]


class _Scanner:
    """Rewrites one alternative from left to right."""

    def __init__(self, pattern: str, barred: str) -> None:
        self._pattern = pattern
        self._barred: _Ranges = [(ord(letter), ord(letter)) for letter in barred]
        self._index = 0

    def whole(self) -> str:
        anything = f"{_written(_without([(0, _LAST)], self._barred))}*"
        start = "" if self._take("^") else anything
        parts: list[str] = []
        depth = 0
        while self._index < len(self._pattern):
            if self._pattern[self._index :] == "$" and not depth:
                return start + "".join(parts)
            parts.append(self._group() or self._one())
            depth += parts[-1].startswith("(?:") - (parts[-1][:1] == ")")
            if depth < 0:
                raise _NotHeld
        if depth:
            raise _NotHeld
        return start + "".join(parts) + anything

    def _group(self) -> str:
        found = _GROUP.match(self._pattern, self._index)
        if found is not None:
            self._index = found.end()
            return "(?:"
        if self._take("|"):
            return "|"
        return f"){self._quantifier()}" if self._take(")") else ""

    def _one(self) -> str:
        """A character or class, with how often it comes."""
        letter = self._pattern[self._index]
        self._index += 1
        if letter in "(*+?{}^$":
            raise _NotHeld
        if letter == "[":
            ranges = self._class()
        elif letter == ".":
            ranges = _without([(0, _LAST)], [(10, 10), (13, 13)])
        elif letter == "\\":
            ranges = self._escape()
        else:
            ranges = [(ord(letter), ord(letter))]
        kept = _without(ranges, self._barred)
        if not kept:
            raise _NotHeld
        return _written(kept) + self._quantifier()

    def _quantifier(self) -> str:
        found = _QUANTIFIER.match(self._pattern, self._index)
        if found is None:
            return ""
        self._index = found.end()
        return found.group(1)

    def _escape(self) -> _Ranges:
        letter = self._pattern[self._index]
        self._index += 1
        if letter.lower() in _CLASSES:
            ranges = _CLASSES[letter.lower()]
            return ranges if letter.islower() else _rest(ranges)
        code = _HEX.match(self._pattern, self._index - 1)
        if code is not None:
            self._index = code.end()
            value = int(code.group(1) or code.group(2), 16)
        elif letter in _CONTROL_ESCAPES:
            value = _CONTROL_ESCAPES[letter]
        elif letter.isascii() and letter.isalnum():
            raise _NotHeld
        else:
            value = ord(letter)
        return [(value, value)]

    def _class(self) -> _Ranges:
        negated = self._take("^")
        found: _Ranges = []
        while not self._take("]") or not found:
            if self._pattern[self._index - 1] == "]" and not found:
                raise _NotHeld  # Empty to some, the beginning of a class to others.
            first = self._member()
            if self._pattern[self._index] == "-" and self._pattern[self._index + 1] != "]":
                self._index += 1
                last = self._member()
                if len(first) > 1 or len(last) > 1 or first[0][0] > last[0][0]:
                    raise _NotHeld
                first = [(first[0][0], last[0][0])]
            found += first
        return _rest(found) if negated else found

    def _member(self) -> _Ranges:
        letter = self._pattern[self._index]
        self._index += 1
        return self._escape() if letter == "\\" else [(ord(letter), ord(letter))]

    def _take(self, wanted: str) -> bool:
        found = self._pattern.startswith(wanted, self._index)
        self._index += len(wanted) if found else 0
        return found


def _rest(ranges: _Ranges) -> _Ranges:
    """What is in none of them. Letters beyond ASCII count as such to some readers of patterns and
    to others not, so that what is beside all letters is left to ASCII."""
    last = 127 if set(_WORDS) <= set(ranges) else _LAST
    return _without([(0, last)], ranges)


def _without(ranges: _Ranges, barred: _Ranges) -> _Ranges:
    kept = ranges
    for first, last in barred:
        kept = [
            part
            for low, high in kept
            for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
            if part[0] <= part[1]
        ]
    return sorted(set(kept))


def _written(ranges: _Ranges) -> str:
    """A class; as what it lacks where that is shorter."""
    rest = _without([(0, _LAST)], ranges)
    sign, shown = ("^", rest) if ranges and ranges[-1][1] == _LAST and rest else ("", ranges)
    if not rest:
        return r"[\s\S]"
    return f"[{sign}{''.join(_range_text(low, high) for low, high in shown)}]"


def _range_text(low: int, high: int) -> str:
    return _code(low) if low == high else f"{_code(low)}-{_code(high)}"


def _code(value: int) -> str:
    if value < 32 or 0xD800 <= value <= 0xDFFF:
        return f"\\u{value:04x}"
    return f"\\{chr(value)}" if chr(value) in r"\^-[]" else chr(value)
