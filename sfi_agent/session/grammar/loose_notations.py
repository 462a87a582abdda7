"""Notations of values that are nearly JSON: Python's, and braces whose texts stand between
delimiters. `session/output/loose_values.py` reads them, and more than what is written here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from sfi_agent.session.grammar.bare_texts import (
    BARRED_IN_BARE_TEXT,
    pattern_of_format,
    plain_text,
)
from sfi_agent.session.grammar.grammar_formats import (
    Format,
    constant_format,
    grammar_format,
    or_format,
    pattern_format,
)
from sfi_agent.session.grammar.held_schema import SchemaReduction
from sfi_agent.session.grammar.text_patterns import CONTROLS, barred_class

__all__ = ["DELIMITER", "BracedNotation", "Notation", "PythonNotation"]

DELIMITER = '<|"|>'
"""On both sides of a text between braces."""

_PLAIN_KEY = re.compile(r"[^\W\d][\w.-]*")
_ANY_VALUE = """\
root ::= {root}
value ::= text | number | list | object | {words}
list ::= "[" blank (value (blank "," blank value)*)? blank "]"
object ::= "{{" blank (pair (blank "," blank pair)*)? blank "}}"
pair ::= {key} blank ":" blank value
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+-]? [0-9] [0-9]?)?
blank ::= [ \\n]?
text ::= {text}
"""


class Notation(Protocol):
    """What differs between the notations.

    Attributes:
        barred: Characters that no text of a pattern may hold.
        equals: Pattern of what stands between an argument's name and its value.
        any_value: Rules of any value, with `{root}` for what they begin with.
    """

    @property
    def barred(self) -> str: ...

    @property
    def equals(self) -> str: ...

    @property
    def any_value(self) -> str: ...

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Names and keys in the order of chat templates."""
        ...

    def words(self, value: bool | None) -> tuple[str, ...]:
        """How true, false and null are written; the first is the usual one."""
        ...

    def text(self, schema: Mapping[str, Any], reduction: SchemaReduction) -> Format:
        """Any text of a reduced schema."""
        ...

    def constant(self, text: str) -> Format:
        """One text."""
        ...

    def name(self, name: str) -> Format:
        """The name of an argument."""
        ...

    def key(self, name: str) -> Format:
        """A key inside an argument."""
        ...

    def any_key(self) -> Format:
        """Any such key."""
        ...


_QUOTES = ("'", '"')


def _python_text(name: str, quote: str, least: int = 0, barred: str = "") -> str:
    """A rule for texts between quotes, with at least so many letters.

    What may follow is said, so that xgrammar need not look for it at every token.
    """
    mark = json.dumps(quote)
    plain = rf"[^{quote}\\\x00-\x1f{barred}]"
    first = f"{plain}{{{least}}} " if least else ""
    return (
        f"{name} ::= {mark} {first}{name}_rest\n"
        rf"""{name}_rest ::= ({mark} | {plain} {name}_rest | "\\" [nt"'\\] {name}_rest)"""
        " (= [ \\n]? [,)\\]}:])\n"
    )


class PythonNotation:
    """`name="text", other=[1, True, None]`, with quotes of both kinds.

    Args:
        barred: Characters that no text may hold beside those that need an escape.
    """

    equals = "="
    any_value = _ANY_VALUE.format(
        root="{root}",
        words='"True" | "False" | "None"',
        key="text",
        text=f"single | double\n{_python_text('single', chr(39))}{_python_text('double', chr(34))}",
    )

    def __init__(self, barred: str = "") -> None:
        self._barred = barred

    @property
    def barred(self) -> str:
        """See `Notation`: a pattern counts no escapes, so there are none."""
        return "\"'\\" + CONTROLS + self._barred

    def ordered(self, names: Iterable[str]) -> list[str]:
        """See `Notation`."""
        return list(names)

    def words(self, value: bool | None) -> tuple[str, ...]:
        """See `Notation`."""
        return {True: ("True", "true"), False: ("False", "false"), None: ("None", "null")}[value]

    def text(self, schema: Mapping[str, Any], reduction: SchemaReduction) -> Format:
        """See `Notation`."""
        pattern = pattern_of_format(schema, reduction)
        if pattern is not None:
            return or_format([pattern_format(f"{q}(?:{pattern}){q}") for q in _QUOTES])
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if most is not None:
            # Where xgrammar counts, there are no escapes.
            plain = {quote: barred_class(f"{quote}\\{CONTROLS}{self._barred}") for quote in _QUOTES}
            return or_format(
                [pattern_format(f"{q}{plain[q]}{{{least},{most}}}{q}") for q in _QUOTES]
            )
        rules = [_python_text("root", quote, least, self._barred) for quote in _QUOTES]
        return or_format([grammar_format(rule) for rule in rules])

    def constant(self, text: str) -> Format:
        """See `Notation`."""
        inside = json.dumps(text, ensure_ascii=False)[1:-1]
        single = inside.replace('\\"', '"').replace("'", "\\'")
        return or_format([constant_format(f"'{single}'"), constant_format(f'"{inside}"')])

    def name(self, name: str) -> Format:
        """See `Notation`."""
        return constant_format(name) if _PLAIN_KEY.fullmatch(name) else self.constant(name)

    def key(self, name: str) -> Format:
        """See `Notation`."""
        return self.constant(name)

    def any_key(self) -> Format:
        """See `Notation`."""
        return self.text({}, SchemaReduction({}, ""))


class BracedNotation:
    """`name:<|"|>text<|"|>,other:[1,true,null]`.

    Args:
        excluded: What no text may hold beside the delimiter.
    """

    equals = ":"
    barred = BARRED_IN_BARE_TEXT
    any_value = _ANY_VALUE.format(
        root="{root}",
        words='"true" | "false" | "null"',
        key="[a-zA-Z_] [a-zA-Z0-9_]*",
        text=r'"<|\"|>" [^<]* "<|\"|>"',
    )

    def __init__(self, excluded: Sequence[str] = ()) -> None:
        self._excluded = excluded

    def ordered(self, names: Iterable[str]) -> list[str]:
        """See `Notation`."""
        return sorted(names, key=str.lower)

    def words(self, value: bool | None) -> tuple[str, ...]:
        """See `Notation`."""
        return (json.dumps(value),)

    def text(self, schema: Mapping[str, Any], reduction: SchemaReduction) -> Format:
        """See `Notation`."""
        content = plain_text(schema, reduction, [DELIMITER, *self._excluded])
        return {"type": "tag", "begin": DELIMITER, "content": content, "end": DELIMITER}

    def constant(self, text: str) -> Format:
        """See `Notation`."""
        return constant_format(f"{DELIMITER}{text}{DELIMITER}")

    def name(self, name: str) -> Format:
        """See `Notation`."""
        return constant_format(name) if _PLAIN_KEY.fullmatch(name) else self.constant(name)

    def key(self, name: str) -> Format:
        """See `Notation`."""
        return self.name(name)

    def any_key(self) -> Format:
        """See `Notation`."""
        return pattern_format("[a-zA-Z_][a-zA-Z0-9_]*")
