"""Pieces of xgrammar's structural tags, of which grammars are put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

__all__ = [
    "Format",
    "constant_format",
    "grammar_format",
    "json_format",
    "optional_format",
    "or_format",
    "pattern_format",
    "repeat_format",
    "sequence_format",
    "text_format",
]

Format: TypeAlias = dict[str, Any]
"""One of xgrammar's formats; {} for nothing at all."""


def sequence_format(elements: Sequence[Format]) -> Format:
    """One after the other; empty elements are left out."""
    present = [element for element in elements if element]
    if len(present) < 2:
        return present[0] if present else {}
    return {"type": "sequence", "elements": present}


def or_format(elements: Sequence[Format]) -> Format:
    """One of them, which may be nothing."""
    present = [element for element in elements if element]
    if not present:
        return {}
    found = present[0] if len(present) == 1 else {"type": "or", "elements": present}
    return found if len(present) == len(elements) else optional_format(found)


def optional_format(content: Format) -> Format:
    """It or nothing."""
    return {"type": "optional", "content": content} if content else {}


def repeat_format(content: Format, least: int, most: int | None) -> Format:
    """It so many times; `most` is None where there is no end."""
    if not content or most == 0:
        return {}
    return {"type": "repeat", "min": least, "max": -1 if most is None else most, "content": content}


def pattern_format(pattern: str) -> Format:
    """A regular expression; empty where it is."""
    return {"type": "regex", "pattern": pattern} if pattern else {}


def constant_format(text: str) -> Format:
    """This text; empty where it is."""
    return {"type": "const_string", "value": text} if text else {}


def text_format(excluded: Sequence[str]) -> Format:
    """Any text without these."""
    return {"type": "any_text", "excludes": list(excluded)}


def json_format(schema: Any, excluded: Sequence[str] = ()) -> Format:
    """JSON of a schema with texts that do not hold what is excluded."""
    found: Format = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": 1}
    return {**found, "excludes": list(excluded)} if excluded else found


def grammar_format(rules: str) -> Format:
    """A grammar in xgrammar's notation."""
    return {"type": "grammar", "grammar": rules}
