"""How a log looks: line prefixes, order of facts, scattering, lines that say nothing useful."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.embedded.fragments import Entity, name_fragments, sentence_fragments
from sfi_agent.embedded.lexicon import Field

__all__ = ["LogStyle", "draw_style", "entity_lines", "filler_lines", "line_prefix", "lines_tokens"]

_THINGS = (
    " printer| lift| coffee machine| front door| heating| projector| server| phone line| window"
    "| water cooler| copier| gate| alarm| carpet| fridge"
).split("|")
_EVENTS = (
    " was repaired| was out of order| was cleaned| needs a new part| made a loud noise"
    "| was checked twice| was switched off| works again| was moved to the hall| got a new sign"
).split("|")
_TIMES = (
    "| in the morning| before lunch| at noon| after lunch| late in the day| around six"
    "| for an hour| once more"
).split("|")
_ERRANDS = (
    " brought cake| called about the parking| asked for new chairs| was late| left early"
    "| cleaned the kitchen| lost an umbrella| ordered paper| booked the hall| fed the fish"
).split("|")


@dataclass(frozen=True, slots=True)
class LogStyle:
    prefix: str
    joiner: str
    shuffle_facts: bool
    scattered: bool
    long_names: bool


def draw_style(rng: random.Random, variant: str) -> LogStyle:
    scattered = long_names = False
    if variant == "hard":
        scattered, long_names = rng.choice(((True, False), (False, True), (True, True)))
    return LogStyle(
        prefix=rng.choice(("-", "-", "*", "time", "#")),
        joiner=rng.choice((",", ",", ";")),
        shuffle_facts=rng.random() < 0.6,
        scattered=scattered,
        long_names=long_names,
    )


def entity_lines(
    rng: random.Random, entity: Entity, fields: tuple[Field, ...], style: LogStyle
) -> list[list[str]]:
    order = list(fields)
    if style.shuffle_facts:
        rng.shuffle(order)
    if not style.scattered:
        return [sentence_fragments(entity, order, style.joiner)]
    lines, start = [], 0
    while start < len(order):
        size = rng.choice((1, 1, 2))
        lines.append(sentence_fragments(entity, order[start : start + size], style.joiner))
        start += size
    return lines


def filler_lines(
    rng: random.Random,
    people: tuple[Entity, ...],
    budget_tokens: float,
    style: LogStyle,
    count: Callable[[str], int],
) -> list[list[str]]:
    lines: list[list[str]] = []
    spent = 0
    while spent < budget_tokens - 5:
        if rng.random() < 0.3:
            line = [*name_fragments(rng.choice(people).name), rng.choice(_ERRANDS)]
        elif rng.random() < 0.2:
            line = [" Parcel", f" {rng.randrange(100, 10000)}", " arrived"]
        else:
            line = [" The", rng.choice(_THINGS), rng.choice(_EVENTS)]
        line.extend(piece for piece in (rng.choice(_TIMES), ".") if piece)
        lines.append(line)
        spent += lines_tokens([line], style, count)
    return lines


def line_prefix(rng: random.Random, style: LogStyle, index: int) -> list[str]:
    if style.prefix == "time":
        return [f"{rng.randrange(7, 19):02d}", ":", f"{rng.randrange(60):02d}"]
    if style.prefix == "#":
        return ["#", str(index + 1)]
    return [style.prefix]


def lines_tokens(lines: list[list[str]], style: LogStyle, count: Callable[[str], int]) -> int:
    per_line = {"time": 6, "#": 4}.get(style.prefix, 2)
    return sum(per_line + sum(map(count, line)) for line in lines)
