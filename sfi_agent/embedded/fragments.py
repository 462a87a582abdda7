"""Facts as pieces of text: entries of a log and the sentences that state them.

A *fragment* is a piece of text whose borders are token borders of the embedded tokenizer: it
may start with a space, and it never splits a word, a number or a run of punctuation marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sfi_agent.embedded import lexicon
from sfi_agent.embedded.lexicon import Field

__all__ = [
    "Entity",
    "approximate_tokens",
    "name_fragments",
    "phrase_fragments",
    "sentence_fragments",
]

_PRE_TOKEN = re.compile(r" ?[^\W\d_]+|\d| ?[^\w\s]+|\s|_")
_ONE_TOKEN_NAMES = frozenset(
    (*lexicon.EASY_PERSON_NAMES, *lexicon.EASY_PROJECT_NAMES, *lexicon.CITIES, *lexicon.MONTHS)
)


@dataclass(frozen=True, slots=True)
class Entity:
    """A person or a project and everything the log says about it.

    Attributes:
        kind: "person" or "project".
        name: Without a leading space; two words for hard names.
        facts: Field key to value; every value is a string.
    """

    kind: str
    name: str
    facts: dict[str, str]


@lru_cache(maxsize=65536)
def approximate_tokens(fragment: str) -> int:
    """Estimated token count of a piece of text, without the tokenizer.

    Words of the lexicon are one token, a three-syllable part of a hard name two.
    """
    count = 0
    for piece in _PRE_TOKEN.findall(fragment):
        word = piece.strip()
        known = word.islower() or word in _ONE_TOKEN_NAMES or not word.isalpha()
        count += 1 if known else 2
    return count


def name_fragments(name: str) -> list[str]:
    """A name as fragments with their leading spaces."""
    return [" " + word for word in name.split(" ")]


def phrase_fragments(field: Field, value: str) -> list[str]:
    """A fact as fragments, such as " sits in room", " 412"."""
    if field.link:
        return [field.phrase, *name_fragments(value)]
    return [field.phrase, " " + value]


def sentence_fragments(entity: Entity, fields: Sequence[Field], joiner: str = ",") -> list[str]:
    """One sentence that states the given facts in the given order, full stop included."""
    parts = name_fragments(entity.name)
    last = len(fields) - 1
    for index, field in enumerate(fields):
        if index:
            parts.append(" and" if index == last else joiner)
        parts.extend(phrase_fragments(field, entity.facts[field.key]))
    parts.append(".")
    return parts
