"""Values in notations that are nearly JSON: Python literals, and strings between special tokens.

Models mix notations: `True` beside `null`, single quotes beside double ones. All of them are read.
"""

from __future__ import annotations

import re
from typing import Any

from sfi_agent.session.output.tool_calls import finite_number

__all__ = ["LooseReader", "LooseSyntaxError", "UnterminatedString"]

_CONSTANTS = {
    **{"true": True, "True": True, "false": False, "False": False},
    **{"null": None, "None": None, "none": None},
}
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", "\\": "\\", "/": "/"}
_INTEGER = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(?:\d+\.\d*|\.?\d+)(?:[eE][+-]?\d+)?")
_BARE = re.compile(r"[^\s,:;()\[\]{}'\"<]+")
_NAME = re.compile(r"[^\W\d][\w.-]*")
_BEHIND_STRING = re.compile(r"\s*(?:[,:)\]}=]|\Z)")
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
_DEEPEST = 64


class LooseSyntaxError(ValueError):
    """The text is no value in any notation that is read."""


class UnterminatedString(LooseSyntaxError):
    """The text ends inside a string."""


class LooseReader:
    """Reads values from a text, from left to right.

    Args:
        text: The text.
        delimiter: A text that stands on both sides of strings, without escapes in between; "" where
            strings have quotes only.

    Attributes:
        position: Where reading goes on.
    """

    def __init__(self, text: str, delimiter: str = "") -> None:
        self._text = text
        self._delimiter = delimiter
        self._depth = 0
        self.position = 0

    @property
    def at_end(self) -> bool:
        """Whether nothing but white space is left."""
        self._skip_space()
        return self.position >= len(self._text)

    def take(self, wanted: str) -> bool:
        """Go over a text that comes next, behind white space; False if it does not."""
        self._skip_space()
        if not self._text.startswith(wanted, self.position):
            return False
        self.position += len(wanted)
        return True

    def expect(self, wanted: str) -> None:
        """The same, or LooseSyntaxError."""
        if not self.take(wanted):
            raise self._problem(f"{wanted!r} is missing")

    def name(self) -> str:
        """A name such as `search` or `notes.search`."""
        self._skip_space()
        return self._match(_NAME, "a name is missing")

    def value(self) -> Any:
        """The next value: a string, number, constant, list or mapping."""
        self._skip_space()
        if self._text.startswith(self._delimiter or "\0", self.position):
            return self._delimited()
        opener = self._text[self.position : self.position + 1]
        if opener in ("'", '"'):
            return self._quoted(opener)
        if opener in _CLOSERS:
            return self._nested(opener)
        return self._bare()

    def pairs(self, separator: str, end: str, *, repeats: bool = False) -> dict[str, Any]:
        """Names with values up to an end: `a=1, b=2)` or `a:1,b:2}`. With `repeats` the last value
        of a name counts."""
        found: dict[str, Any] = {}
        while not self.take(end):
            key = self._key(separator)
            self.expect(separator)
            if key in found and not repeats:
                raise self._problem(f"{key!r} is given twice")
            found[key] = self.value()
            if not self.take(","):
                self.expect(end)
                break
        return found

    def _nested(self, opener: str) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._problem("it is nested too deeply")
        self.position += 1
        items: Any
        if opener == "{":
            items = self.pairs(":", "}", repeats=True)
        else:
            items = self._items(_CLOSERS[opener])
        self._depth -= 1
        return items

    def _items(self, end: str) -> list[Any]:
        items: list[Any] = []
        while not self.take(end):
            items.append(self.value())
            if not self.take(","):
                self.expect(end)
                break
        return items

    def _key(self, separator: str) -> str:
        self._skip_space()
        quoted = self._text[self.position : self.position + 1] in ("'", '"')
        if quoted or self._text.startswith(self._delimiter or "\0", self.position):
            return str(self.value())
        end = self._text.find(separator, self.position)
        key = self._text[self.position : end].strip() if end >= 0 else ""
        if not key or any(mark in key for mark in ",{}[]()'\"\n"):
            raise self._problem("an argument without a name")
        self.position = end
        return key

    def _delimited(self) -> str:
        start = self.position + len(self._delimiter)
        end = self._text.find(self._delimiter, start)
        if end < 0:
            raise UnterminatedString("a string is not closed")
        self.position = end + len(self._delimiter)
        return self._text[start:end]

    def _quoted(self, quote: str) -> str:
        parts: list[str] = []
        end = self._closing_quote(quote)
        index = self.position + len(end)
        while index < len(self._text):
            letter = self._text[index]
            if letter == "\\":
                piece, index = self._escape(index + 1)
                parts.append(piece)
                continue
            # A quote that nothing can follow is an apostrophe that was not escaped.
            if self._text.startswith(end, index):
                if _BEHIND_STRING.match(self._text, index + len(end)):
                    self.position = index + len(end)
                    return _join_surrogates("".join(parts))
            index += 1
            parts.append(letter)
        raise UnterminatedString("a string is not closed")

    def _closing_quote(self, quote: str) -> str:
        """What closes the string that begins here: three quotes where three are closed again."""
        tripled = quote * 3
        start = self.position + len(tripled)
        if self._text.startswith(tripled, self.position) and tripled in self._text[start:]:
            return tripled
        return quote

    def _escape(self, index: int) -> tuple[str, int]:
        letter = self._text[index : index + 1]
        if letter in _ESCAPES:
            return _ESCAPES[letter], index + 1
        if letter in ("'", '"'):
            return letter, index + 1
        digits = {"u": 4, "x": 2, "U": 8}.get(letter, 0)
        code = self._text[index + 1 : index + 1 + digits]
        if digits and re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", code):
            if int(code, 16) <= 0x10FFFF:
                return chr(int(code, 16)), index + 1 + digits
        return "\\" + letter, index + 1

    def _bare(self) -> Any:
        word = self._match(_BARE, "a value is missing")
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if _INTEGER.fullmatch(word):
            return int(word)
        if _FLOAT.fullmatch(word):
            return finite_number(word)
        raise LooseSyntaxError(f"{word!r} is no value; strings need quotes")

    def _match(self, pattern: re.Pattern[str], problem: str) -> str:
        match = pattern.match(self._text, self.position)
        if match is None:
            raise self._problem(problem)
        self.position = match.end()
        return match.group()

    def _skip_space(self) -> None:
        while self._text[self.position : self.position + 1].isspace():
            self.position += 1

    def _problem(self, problem: str) -> LooseSyntaxError:
        if self.position >= len(self._text):
            return UnterminatedString("it ends too early")
        return LooseSyntaxError(f"{problem} at character {self.position}")


def _join_surrogates(text: str) -> str:
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
