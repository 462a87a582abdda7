"""Facts as pieces of text: entries of a log and the sentences that state them.

A *fragment* is a piece of text whose borders are token borders of the embedded tokenizer: it
may start with a space, and it never splits a word, a number or a run of punctuation marks.
A *statement* is a sentence about one entry in which every fragment is one token: the name, then
four fragments per fact (two words, the value, and a joiner or the full stop).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sfi_agent.embedded.lexicon import Field

__all__ = [
    "Entity",
    "Line",
    "approximate_tokens",
    "enumeration",
    "number_fragments",
    "statement",
    "value_index",
]

_PRE_TOKEN = re.compile(r" ?[^\W\d_]+| [1-9]\d\d(?!\d)|\d| ?[^\w\s]+|\s|_")
_NUMBER = re.compile(r"( ?\d+)")


@dataclass(frozen=True, slots=True)
class Entity:
    """A person or a project and everything the log says about it.

    Attributes:
        kind: "person" or "project".
        name: One word, without a leading space.
        facts: Field key to value; every value is a string.
    """

    kind: str
    name: str
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log.

    Attributes:
        fragments: Its text without prefix and newline.
        subject: Name of the entry it states facts of; "" for lines that matter to nobody.
        keys: Keys of the stated facts, in order.
    """

    fragments: tuple[str, ...]
    subject: str = ""
    keys: tuple[str, ...] = ()

    def without(self, dropped: Collection[str]) -> Line | None:
        """The line without some of its facts; None when nothing is left to say."""
        kept = [index for index, key in enumerate(self.keys) if key not in dropped]
        if len(kept) == len(self.keys):
            return self
        if not kept:
            return None
        parts = [self.fragments[0]]
        for place, index in enumerate(kept):
            if place:
                parts.append(" and" if place == len(kept) - 1 else ",")
            parts.extend(self.fragments[value_index(index) - 2 : value_index(index) + 1])
        return Line((*parts, "."), self.subject, tuple(self.keys[index] for index in kept))


@lru_cache(maxsize=65536)
def approximate_tokens(fragment: str) -> int:
    """Token count of a piece of text made of words of the world, without the tokenizer."""
    return len(_PRE_TOKEN.findall(fragment))


def number_fragments(text: str) -> list[str]:
    """Text cut before and after its numbers, each with the space before it."""
    return [piece for piece in _NUMBER.split(text) if piece]


def enumeration(words: Sequence[str]) -> list[str]:
    """Fragments of "a", "a and b", "a, b and c"; each word gets a space before it."""
    result: list[str] = []
    for index, word in enumerate(words):
        if index:
            result.append(" and" if index == len(words) - 1 else ",")
        result.append(f" {word}")
    return result


def statement(entity: Entity, fields: Sequence[Field], joiner: str = ",") -> list[str]:
    """One sentence that states the given facts in the given order, full stop included."""
    parts = [f" {entity.name}"]
    last = len(fields) - 1
    for index, field in enumerate(fields):
        if index:
            parts.append(" and" if index == last else joiner)
        parts.extend((*field.phrase, f" {entity.facts[field.key]}"))
    parts.append(".")
    return parts


def value_index(fact: int) -> int:
    """Index of the fragment of a statement that holds the value of its fact number `fact`."""
    return 3 + 4 * fact
