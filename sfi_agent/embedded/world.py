"""The office-log world: people and projects with facts, written down as a log.

Everything is deterministic from the random generator it is given. Texts are made as lists of
*fragments* whose borders are token borders of the embedded tokenizer (a fragment may start with
a space and never splits a word, a number or a run of punctuation marks), so that training can
tokenise by table look-up what sessions later see as plain text.

Two variants:

- easy: one line holds all facts of an entry;
- hard: the facts of an entry are scattered over several lines, one or two in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.embedded import lexicon
from sfi_agent.embedded.fragments import Entity, Line, approximate_tokens
from sfi_agent.embedded.lexicon import Field
from sfi_agent.embedded.log_style import (
    LogStyle,
    draw_style,
    entity_lines,
    filler_lines,
    lines_tokens,
)
from sfi_agent.errors import InputError, explain

__all__ = ["MAX_LOG_TOKENS", "VARIANTS", "Office", "make_office"]

VARIANTS = ("easy", "hard")
MAX_LOG_TOKENS = 9216
"""Longest log that can be made: the names give out beyond it."""
_MIN_LOG_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Office:
    """One log with the truth behind it.

    Attributes:
        day: Weekday in the header of the log.
        variant: "easy" or "hard".
        people, projects: All entries, in no particular order; names are unique.
        person_fields, project_fields: The fields that every entry of this log has.
        header: The first line in pieces.
        prefix: What stands at the start of every other line.
        lines: All lines after the header, in order.
    """

    day: str
    variant: str
    people: tuple[Entity, ...]
    projects: tuple[Entity, ...]
    person_fields: tuple[Field, ...]
    project_fields: tuple[Field, ...]
    header: tuple[str, ...]
    prefix: str
    lines: tuple[Line, ...]

    @property
    def log(self) -> str:
        """The log as text, header first, without a newline at the end."""
        rest = (f"\n{self.prefix}{''.join(line.fragments)}" for line in self.lines)
        return "".join((*self.header, *rest))

    def entity(self, name: str) -> Entity:
        """The entry of this name; KeyError when the log has none."""
        for entity in (*self.people, *self.projects):
            if entity.name == name:
                return entity
        raise KeyError(name)

    def fields_of(self, kind: str) -> tuple[Field, ...]:
        """Fields that every entry of this kind has."""
        return self.person_fields if kind == "person" else self.project_fields


def make_office(
    rng: random.Random,
    variant: str,
    log_tokens: int,
    *,
    required: frozenset[str] = frozenset(),
    count: Callable[[str], int] = approximate_tokens,
) -> Office:
    """Draw an office and write its log of about `log_tokens` tokens (within some 10 %).

    Args:
        rng: Source of every choice.
        variant: "easy" or "hard".
        log_tokens: Length aimed at, 160 to `MAX_LOG_TOKENS` tokens.
        required: Person fields that must not be left out.
        count: Token count of one fragment.

    Raises:
        InputError: Unknown variant or a length out of range.
    """
    _check(variant, log_tokens)
    style = draw_style(rng, variant)
    person_fields = _draw_fields(rng, lexicon.PERSON_FIELDS, rng.randint(1, 3), required)
    project_fields = _draw_fields(rng, lexicon.PROJECT_FIELDS, rng.randint(0, 1), frozenset())
    filler_share = rng.uniform(0.03, 0.2)
    people, projects = _draw_entities(
        rng, style, person_fields, project_fields, log_tokens * (1 - filler_share), count
    )
    day = rng.choice(lexicon.DAYS)
    lines = [
        line
        for entity in (*people, *projects)
        for line in entity_lines(
            rng, entity, person_fields if entity.kind == "person" else project_fields, style
        )
    ]
    lines.extend(filler_lines(rng, people, log_tokens - lines_tokens(lines, count), count))
    rng.shuffle(lines)
    header = ("Office log of", f" {day}", ":")
    return Office(
        day,
        variant,
        people,
        projects,
        person_fields,
        project_fields,
        header,
        style.prefix,
        tuple(lines),
    )


def _check(variant: str, log_tokens: int) -> None:
    if variant not in VARIANTS:
        raise InputError(
            explain("Making an office log", got=f"variant {variant!r}", allowed=str(VARIANTS))
        )
    if not _MIN_LOG_TOKENS <= log_tokens <= MAX_LOG_TOKENS:
        raise InputError(
            explain(
                "Making an office log",
                got=f"log_tokens {log_tokens!r}",
                allowed=f"{_MIN_LOG_TOKENS} to {MAX_LOG_TOKENS}",
            )
        )


def _draw_fields(
    rng: random.Random, fields: tuple[Field, ...], dropped: int, required: frozenset[str]
) -> tuple[Field, ...]:
    kept = list(fields)
    for _ in range(dropped):
        keys = {field.key for field in kept}
        choices = [
            field
            for field in kept
            if field.key not in required
            and not (field.key in {"manager", "cover"} and not {"manager", "cover"} <= keys)
        ]
        kept.remove(rng.choice(choices))
    rng.shuffle(kept)
    return tuple(kept)


def _draw_names(rng: random.Random, kind: str, number: int) -> list[str]:
    pool = lexicon.PERSON_NAMES if kind == "person" else lexicon.PROJECT_NAMES
    return rng.sample(pool, min(number, len(pool)))


def _draw_entities(
    rng: random.Random,
    style: LogStyle,
    person_fields: tuple[Field, ...],
    project_fields: tuple[Field, ...],
    budget_tokens: float,
    count: Callable[[str], int],
) -> tuple[tuple[Entity, ...], tuple[Entity, ...]]:
    """As many people and projects as fill `budget_tokens`, a fifth of them projects or fewer."""
    project_share = rng.uniform(0.1, 0.2)
    sample_names = _draw_names(rng, "person", 4)
    sample = [
        _fill(rng, "person", name, person_fields, sample_names, sample_names)
        for name in sample_names
    ]
    sample_lines = [
        line for entity in sample for line in entity_lines(rng, entity, person_fields, style)
    ]
    cost = lines_tokens(sample_lines, count) / len(sample)
    number = max(4, round(budget_tokens / (cost * (1 - 0.3 * project_share))))
    project_number = max(2, round(number * project_share))
    people_names = _draw_names(rng, "person", max(3, number - project_number))
    project_names = _draw_names(rng, "project", project_number)
    people = tuple(
        _fill(rng, "person", name, person_fields, people_names, project_names)
        for name in people_names
    )
    projects = tuple(
        _fill(rng, "project", name, project_fields, people_names, project_names)
        for name in project_names
    )
    return _with_unique_badges(rng, people), projects


def _fill(
    rng: random.Random,
    kind: str,
    name: str,
    fields: tuple[Field, ...],
    people_names: list[str],
    project_names: list[str],
) -> Entity:
    facts: dict[str, str] = {}
    for field in fields:
        if field.number:
            facts[field.key] = rng.choice(lexicon.NUMBERS)
        elif field.link:
            names = people_names if field.link == "person" else project_names
            value = rng.choice(names)
            while value == name:
                value = rng.choice(names)
            facts[field.key] = value
        else:
            facts[field.key] = rng.choice(field.values)
    return Entity(kind, name, facts)


def _with_unique_badges(rng: random.Random, people: tuple[Entity, ...]) -> tuple[Entity, ...]:
    if not people or "badge" not in people[0].facts:
        return people
    badges = rng.sample(lexicon.NUMBERS, len(people))
    return tuple(
        Entity(person.kind, person.name, {**person.facts, "badge": badge})
        for person, badge in zip(people, badges, strict=True)
    )
