"""Texts that stand between tags as they are, without quotes and escapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sfi_agent.session.grammar.grammar_formats import (
    Format,
    constant_format,
    or_format,
    pattern_format,
    sequence_format,
    text_format,
)
from sfi_agent.session.grammar.held_schema import SchemaReduction

__all__ = ["BARRED_IN_BARE_TEXT", "bare_text_format", "is_text", "pattern_of_format", "plain_text"]

BARRED_IN_BARE_TEXT = "<" + "".join(chr(code) for code in range(32) if chr(code) not in "\n\t")
"""What no text of a pattern holds: it could be the beginning of the tag behind it."""

_DATE = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    r"(?:Z|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_PATTERNS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "email": r"[a-zA-Z0-9_+\-]+(?:\.[a-zA-Z0-9_+\-]+)*@[a-zA-Z0-9\-]+(?:\.[a-zA-Z0-9\-]+)+",
}
_DEEPEST = 8


def pattern_of_format(schema: Mapping[str, Any], reduction: SchemaReduction) -> str | None:
    """The pattern of a reduced text's `format` or `pattern`; None where it has none that is held
    outside of JSON."""
    if "pattern" in schema:
        return str(schema["pattern"]).removeprefix("^(?:").removesuffix(")$")
    if "format" in schema and schema["format"] not in _PATTERNS:
        reduction.not_held.add("format")
    return _PATTERNS.get(schema.get("format", ""))


def is_text(schema: Mapping[str, Any], reduction: SchemaReduction, deepest: int = _DEEPEST) -> bool:
    """Whether readers take an argument of this reduced schema for bare text: wherever it may be
    one, or where no type is named."""
    schema = reduction.resolved(schema) if "$ref" in schema else schema
    if "anyOf" in schema:
        return bool(deepest) and any(
            is_text(choice, reduction, deepest - 1) for choice in schema["anyOf"]
        )
    if "enum" in schema:
        return any(isinstance(value, str) for value in schema["enum"])
    return not schema or "string" in _types(schema)


def bare_text_format(
    schema: Mapping[str, Any], reduction: SchemaReduction, excluded: Sequence[str]
) -> Format:
    """Text of a reduced schema. What is no text in it is written as one that says so.

    Args:
        schema: One that `is_text`.
        reduction: Its reduction.
        excluded: What the text must not hold.
    """
    choices: list[Format] = []
    for one in _alternatives(schema, reduction, _DEEPEST):
        if "enum" in one:
            texts = [value for value in one["enum"] if isinstance(value, str)]
            choices += [constant_format(text) for text in texts]
            choices += [constant_format("null")] if None in one["enum"] else []
            continue
        if not one or "string" in _types(one):
            choices.append(plain_text(one, reduction, excluded))
        if "null" in _types(one):
            choices.append(constant_format("null"))
    anything = text_format(excluded)
    return anything if anything in choices else or_format(choices)


def plain_text(
    schema: Mapping[str, Any], reduction: SchemaReduction, excluded: Sequence[str]
) -> Format:
    """The same for one text alone."""
    pattern = pattern_of_format(schema, reduction)
    if pattern is not None:
        return pattern_format(pattern)
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if most is not None:
        # Counted texts hold no "<": xgrammar counts tokens that end within a character wrongly
        # where it looks for a closing itself.
        return pattern_format(f"[^<]{{{least},{most}}}")
    first = pattern_format(f"[^<]{{{least}}}" if least else "")
    return sequence_format([first, text_format(excluded)])


def _alternatives(
    schema: Mapping[str, Any], reduction: SchemaReduction, deepest: int
) -> Iterator[Mapping[str, Any]]:
    schema = reduction.resolved(schema) if "$ref" in schema else schema
    if "anyOf" not in schema:
        yield schema
        return
    for choice in schema["anyOf"] if deepest else ():
        yield from _alternatives(choice, reduction, deepest - 1)


def _types(schema: Mapping[str, Any]) -> list[str]:
    declared = schema.get("type", [])
    return [declared] if isinstance(declared, str) else list(declared)
