"""Plain English that says nothing a task asks about: the haystack of needles.

Sentences come from patterns and word lists of our own, so that they differ in length and shape
and hold no digit and no word of a needle. They stand in for the essays that published haystacks
are made of; numbers measured on them are not comparable with those.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from sfi_agent.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS

__all__ = ["REPEATED_BLOCK", "sentences"]

REPEATED_BLOCK = (
    "The kettle is on. The rain has stopped. A door opens and closes. Nothing else happens here."
)
"""What the haystacks of one repeated text repeat."""

_PEOPLE = (
    "the neighbour",
    "my aunt",
    "a visitor",
    "the clerk",
    "an old friend",
    "the gardener",
    "one of the children",
    "the night porter",
    "a stranger",
    "the new owner",
    "our guide",
    "the committee",
)
_TIMES = (
    "before breakfast",
    "on most days",
    "late in the year",
    "after a long silence",
    "during the storm",
    "once a month",
    "at the end of the week",
    "without any hurry",
    "as the bells rang",
    "while the others slept",
)
_PLACES = (
    "behind the {noun}",
    "near the {adjective} {noun}",
    "on the way to the {noun}",
    "not far from the {noun}",
    "between the {noun} and the {other}",
    "under a {adjective} {noun}",
)
_REMARKS = (
    "which surprised nobody",
    "and that was all",
    "although it hardly mattered",
    "because there was time",
    "so the day went on",
    "as people sometimes do",
    "and nobody asked why",
)
_PATTERNS = (
    "{person} {verb} the {adjective} {noun} {time}.",
    "{time}, {person} {verb} a {noun} {place}.",
    "{place}, {person} {verb} the {noun}, {remark}.",
    "{person} never {verb} the {noun}, but {second} {other_verb} it {time}.",
    "nobody knew who had {verb} the {adjective} {noun} {place}.",
    "the {noun} was {adjective}, and the {other} was not.",
    "if the {noun} had been {adjective}, {person} would not have {verb} it.",
    "{person} said that the {noun} {place} was too {adjective}, {remark}.",
    "there is a {adjective} {noun} {place}, {remark}.",
    "{person} and {second} {verb} the {other} {time}, {remark}.",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences, each with its full stop."""
    while True:
        yield _sentence(rng)


def _sentence(rng: random.Random) -> str:
    person, second = rng.sample(_PEOPLE, 2)
    noun, other = rng.sample(NOUNS, 2)
    adjective = rng.choice(ADJECTIVES)
    verb, other_verb = rng.sample(VERBS, 2)
    place_noun, place_other = rng.sample(NOUNS, 2)
    place = rng.choice(_PLACES).format(
        noun=place_noun, other=place_other, adjective=rng.choice(ADJECTIVES)
    )
    text = rng.choice(_PATTERNS).format(
        person=person,
        second=second,
        noun=noun,
        other=other,
        adjective=adjective,
        verb=verb,
        other_verb=other_verb,
        place=place,
        time=rng.choice(_TIMES),
        remark=rng.choice(_REMARKS),
    )
    return text[0].upper() + text[1:]
