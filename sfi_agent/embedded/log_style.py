"""How a log looks: line prefixes, order of facts, scattering, lines that say nothing useful."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.embedded.fragments import Entity, Line, statement
from sfi_agent.embedded.lexicon import Field

__all__ = [
    "ERRANDS",
    "EVENTS",
    "PREFIXES",
    "THINGS",
    "TIMES",
    "LogStyle",
    "draw_style",
    "entity_lines",
    "filler_lines",
    "lines_tokens",
]

PREFIXES = ("-", "*", "+")
THINGS = (
    " printer| lift| coffee machine| front door| heating| projector| server| phone line| window"
    "| water cooler| copier| gate| alarm| carpet| fridge"
).split("|")
EVENTS = (
    " was repaired| was out of order| was cleaned| needs a new part| made a loud noise"
    "| was checked twice| was switched off| works again| was moved to the hall| got a new sign"
).split("|")
TIMES = (
    "| in the morning| before lunch| at noon| after lunch| late in the day| around six"
    "| for an hour| once more"
).split("|")
ERRANDS = (
    " brought cake| called about the parking| asked for new chairs| was late| left early"
    "| cleaned the kitchen| lost an umbrella| ordered paper| booked the hall| fed the fish"
).split("|")
_LINE_FRAME_TOKENS = 2
"""Newline and prefix."""


@dataclass(frozen=True, slots=True)
class LogStyle:
    prefix: str
    joiner: str
    shuffle_facts: bool
    scattered: bool


def draw_style(rng: random.Random, variant: str) -> LogStyle:
    return LogStyle(
        prefix=rng.choice(PREFIXES),
        joiner=rng.choice((",", ",", ";")),
        shuffle_facts=rng.random() < 0.6,
        scattered=variant == "hard",
    )


def entity_lines(
    rng: random.Random, entity: Entity, fields: tuple[Field, ...], style: LogStyle
) -> list[Line]:
    order = list(fields)
    if style.shuffle_facts:
        rng.shuffle(order)
    lines, start = [], 0
    while start < len(order):
        size = rng.choice((1, 1, 2)) if style.scattered else len(order)
        part = order[start : start + size]
        keys = tuple(field.key for field in part)
        lines.append(Line(tuple(statement(entity, part, style.joiner)), entity.name, keys))
        start += size
    return lines


def filler_lines(
    rng: random.Random,
    people: tuple[Entity, ...],
    budget_tokens: float,
    count: Callable[[str], int],
) -> list[Line]:
    lines: list[Line] = []
    spent = 0
    while spent < budget_tokens - 5:
        if rng.random() < 0.3:
            parts = [f" {rng.choice(people).name}", rng.choice(ERRANDS)]
        elif rng.random() < 0.2:
            parts = [" Parcel", f" {rng.randrange(100, 1000)}", " arrived"]
        else:
            parts = [" The", rng.choice(THINGS), rng.choice(EVENTS)]
        time = rng.choice(TIMES)
        lines.append(Line((*parts, time, ".") if time else (*parts, ".")))
        spent += lines_tokens(lines[-1:], count)
    return lines


def lines_tokens(lines: list[Line], count: Callable[[str], int]) -> int:
    return sum(_LINE_FRAME_TOKENS + sum(map(count, line.fragments)) for line in lines)
