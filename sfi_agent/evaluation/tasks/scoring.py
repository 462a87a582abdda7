"""How answers are judged: small functions that say which parts are right.

All of them compare text; none knows a task. What counts is the output behind the answer prefix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from sfi_agent.evaluation.tasks.task import Score

__all__ = [
    "calls_said",
    "contained",
    "first_number",
    "first_numbers_equal",
    "lines_contained",
    "numbered_equal",
    "overlap_score",
    "score_of",
    "sentences_said",
    "tool_calls_in",
]

_NUMBER = re.compile(r"-?\d+")
_SENTENCE = re.compile(r"[^.]+\.?")


def score_of(parts: Sequence[bool]) -> Score:
    """The score of an answer whose parts are all alike: exact when all are right."""
    return Score(sum(parts), len(parts), all(parts))


def contained(
    references: Sequence[str], output: str, *, ignore_case: bool = False
) -> tuple[bool, ...]:
    """Which references occur in the output, as RULER's string match and SCBench's retrieval do."""
    if ignore_case:
        output = output.lower()
        return tuple(reference.lower() in output for reference in references)
    return tuple(reference in output for reference in references)


def lines_contained(references: Sequence[str], output: str) -> tuple[bool, ...]:
    """Which references are lines of the output; spaces at the ends of lines do not count."""
    lines = {line.strip() for line in output.splitlines()}
    return tuple(reference in lines for reference in references)


def numbered_equal(references: Sequence[str], output: str) -> tuple[bool, ...]:
    """Which references stand behind their number, "1. first 2. second", exactly.

    A number that occurs twice counts with what it says first.
    """
    found: dict[int, str] = {}
    for number, text in re.findall(r"(?<!\S)(\d+)\. +(\S+)", output):
        found.setdefault(int(number), text.rstrip(",;."))
    return tuple(
        found.get(number) == reference for number, reference in enumerate(references, start=1)
    )


def first_number(output: str) -> int | None:
    """The first integer of the output, None without one."""
    match = _NUMBER.search(output)
    return int(match[0]) if match else None


def first_numbers_equal(references: Sequence[str], output: str) -> tuple[bool, ...]:
    """Whether the first integer of the output is the reference (of which there is one)."""
    found = first_number(output)
    return tuple(found == int(reference) for reference in references)


def overlap_score(references: Collection[str], said: Collection[str]) -> Score:
    """Intersection over union of two sets: wrong additions count as much as omissions."""
    expected, answered = set(references), set(said)
    return Score(len(expected & answered), len(expected | answered), expected == answered)


def sentences_said(references: Sequence[str], output: str) -> tuple[bool, ...]:
    """Which reference sentences the output has word for word; one that is expected twice must be
    said twice. Sentences end with full stops."""
    said = [sentence.strip() for sentence in _SENTENCE.findall(output.strip())]
    found = []
    for reference in references:
        found.append(reference in said)
        if found[-1]:
            said.remove(reference)
    return tuple(found)


def tool_calls_in(output: str) -> list[dict[str, Any]]:
    """JSON objects of the output that have a name and arguments, in order."""
    decoder, calls, place = json.JSONDecoder(), [], 0
    while (place := output.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(output, place)
        except ValueError:
            place += 1
            continue
        if {"name", "arguments"} <= value.keys():
            calls.append({"name": value["name"], "arguments": value["arguments"]})
        place = end
    return calls


def calls_said(references: Sequence[str], output: str) -> tuple[bool, ...]:
    """Which reference calls (JSON) the output makes; order and layout of the JSON do not count."""
    said = tool_calls_in(output)
    found = []
    for reference in references:
        call = json.loads(reference)
        found.append(call in said)
        if found[-1]:
            said.remove(call)
    return tuple(found)
