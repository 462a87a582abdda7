"""Parts of a call with commas between them, some of which may be missing."""

from __future__ import annotations

from collections.abc import Sequence

from sfi_agent.session.grammar.grammar_formats import (
    Format,
    optional_format,
    or_format,
    pattern_format,
    repeat_format,
    sequence_format,
)

__all__ = ["items_format", "parts_format"]

_COMMA = pattern_format(",[ \\n]?")


def parts_format(parts: Sequence[Format], needed: Sequence[bool], rest: Format) -> Format:
    """Parts in their order.

    Args:
        parts: The parts.
        needed: Which of them cannot be left out.
        rest: What may follow any number of times; {} for nothing.
    """
    tails = [_repeated(rest, 0, None)]
    for part, need in zip(reversed(parts), reversed(needed), strict=True):
        own = sequence_format([_COMMA, part])
        tails.insert(0, sequence_format([own if need else optional_format(own), tails[0]]))
    # Each is tried as the first one, up to the first that is needed.
    firsts: list[Format] = []
    for index, part in enumerate(parts):
        firsts.append(sequence_format([part, tails[index + 1]]))
        if needed[index]:
            return or_format(firsts)
    return or_format([*firsts, _list_of(rest, 0, None)])


def items_format(
    first: Sequence[Format], rest: Format, least: int = 0, most: int | None = None
) -> Format:
    """Items of a list, as many as it must and may have.

    Args:
        first: Of the first items, one by one.
        rest: Of every further one; {} where there is none.
        least, most: How many there are; `most` is None where there is no end.
    """
    first = first[:most]
    others = None if most is None else most - len(first)
    if not first:
        return _list_of(rest, least, others)
    behind = _repeated(rest, max(0, least - len(first)), others)
    # Nothing follows the first item that is missing.
    for index in range(len(first) - 1, 0, -1):
        behind = sequence_format([_COMMA, first[index], behind])
        behind = behind if index < least else optional_format(behind)
    whole = sequence_format([first[0], behind])
    return whole if least else optional_format(whole)


def _list_of(item: Format, least: int, most: int | None) -> Format:
    if not item or most == 0:
        return {}
    others = None if most is None else most - 1
    whole = sequence_format([item, _repeated(item, max(0, least - 1), others)])
    return whole if least else optional_format(whole)


def _repeated(item: Format, least: int, most: int | None) -> Format:
    return repeat_format(sequence_format([_COMMA, item]) if item else {}, least, most)
