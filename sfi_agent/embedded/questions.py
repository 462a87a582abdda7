"""Questions about an office log with the answers, sentence by sentence, that are right.

`make_turn` draws one question of a given kind:

- report: several facts of several entries, one sentence per entry;
- chain: follow one or two links from entry to entry, one sentence per link, then one fact;
- attribute: one fact of one entry;
- tool: needs one or two tool calls with arguments out of the log, then an answer from the result.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sfi_agent.embedded import office_tools
from sfi_agent.embedded.fragments import Entity, enumeration, statement
from sfi_agent.embedded.lexicon import PERSON_FIELDS, Field
from sfi_agent.embedded.world import Office

__all__ = ["KINDS", "REQUIRED_FIELDS", "Sentence", "ToolUse", "Turn", "make_turn"]

KINDS = ("report", "chain", "attribute", "tool")
REQUIRED_FIELDS: dict[str, frozenset[str]] = {"tool": frozenset({"badge", "room"})}
"""Person fields that a log must have for questions of a kind."""

_REPORT_FORMS = (("Report the", " of"), ("Write a report with the", " of"), ("Give me the", " for"))
_CHAIN_FORMS = (("From", " follow"), ("Start at", " and go over"))
_ATTRIBUTE_FORMS = ("What is the", "Tell me the", "Look up the")
_TOOL_FORMS = {
    "phone": ("What is the", "Find the", " of"),
    "place": ("Look at the", "Check the", " of"),
    "note": ("Send the", "Please send the", " for"),
}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One tool call that is expected, and what the tool returns."""

    name: str
    arguments: Mapping[str, str | int]
    result: str

    @property
    def call_json(self) -> str:
        """The call as the model writes it."""
        return json.dumps({"name": self.name, "arguments": dict(self.arguments)})


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of an answer: its fragments (see `statement`), and the facts it states."""

    fragments: tuple[str, ...]
    subject: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question, the tool calls it needs, and the sentences of its answer.

    Attributes:
        kind: One of `KINDS`.
        question: The question as fragments.
        nouns: Indices into `question` of the words that name the facts asked for.
        names: Indices into `question` of the names asked about.
        calls: Tool calls expected before the answer, one per name, or none.
        sentences: The answer.
    """

    kind: str
    question: tuple[str, ...]
    nouns: tuple[int, ...]
    names: tuple[int, ...]
    calls: tuple[ToolUse, ...]
    sentences: tuple[Sentence, ...]


def make_turn(rng: random.Random, office: Office, kind: str) -> Turn:
    """Draw one question of this kind over the office.

    Raises:
        KeyError: The kind is unknown, or the log lacks one of its `REQUIRED_FIELDS`.
    """
    return _MAKERS[kind](rng, office)


class _Question:
    """Collects the fragments of a question and where its nouns and names stand."""

    def __init__(self, start: str) -> None:
        self.fragments = [start]
        self.nouns: tuple[int, ...] = ()
        self.names: tuple[int, ...] = ()

    def add(self, *fragments: str) -> _Question:
        self.fragments.extend(fragments)
        return self

    def add_nouns(self, nouns: Sequence[str]) -> _Question:
        self.nouns = self._add_list(enumeration(nouns))
        return self

    def add_path(self, nouns: Sequence[str]) -> _Question:
        """Nouns of a chain: "manager then cover to city"."""
        parts = [f" {nouns[0]}"]
        for index, noun in enumerate(nouns[1:], 1):
            parts.extend((" to" if index == len(nouns) - 1 else " then", f" {noun}"))
        self.nouns = self._add_list(parts)
        return self

    def add_names(self, names: Sequence[str]) -> _Question:
        self.names = self._add_list(enumeration(names))
        return self

    def turn(self, kind: str, sentences: Sequence[Sentence], calls: Sequence[ToolUse] = ()) -> Turn:
        return Turn(
            kind, tuple(self.fragments), self.nouns, self.names, tuple(calls), tuple(sentences)
        )

    def _add_list(self, parts: list[str]) -> tuple[int, ...]:
        start = len(self.fragments)
        self.fragments.extend(parts)
        return tuple(range(start, start + len(parts), 2))


def _sentence(entity: Entity, fields: Sequence[Field]) -> Sentence:
    keys = tuple(field.key for field in fields)
    return Sentence(tuple(statement(entity, fields)), entity.name, keys)


def _report(rng: random.Random, office: Office) -> Turn:
    projects = len(office.projects) > 2 and rng.random() < 0.2
    entities = office.projects if projects else office.people
    fields = office.project_fields if projects else office.person_fields
    asked = rng.sample(fields, min(len(fields), rng.choice((4, 5, 5, 5, 6))))
    subjects = rng.sample(entities, min(len(entities), rng.choice((2, 3, 3, 4, 4, 5, 6))))
    start, glue = rng.choice(_REPORT_FORMS)
    question = _Question(start).add_nouns([field.noun for field in asked]).add(glue)
    question.add_names([entity.name for entity in subjects]).add(".")
    return question.turn("report", [_sentence(entity, asked) for entity in subjects])


def _chain(rng: random.Random, office: Office) -> Turn:
    person = rng.choice(office.people)
    person_links = [field for field in office.person_fields if field.link == "person"]
    project_link = [field for field in office.person_fields if field.link == "project"]
    links = rng.sample(person_links, min(len(person_links), rng.choice((1, 1, 2))))
    if project_link and rng.random() < 0.3:
        links[-1] = project_link[0]
    current: Entity = person
    sentences = []
    for link in links:
        sentences.append(_sentence(current, [link]))
        current = office.entity(current.facts[link.key])
    asked = rng.choice([f for f in office.fields_of(current.kind) if not f.link])
    sentences.append(_sentence(current, [asked]))
    start, middle = rng.choice(_CHAIN_FORMS)
    question = _Question(start).add_names([person.name]).add(middle)
    question.add_path([field.noun for field in (*links, asked)]).add(".")
    return question.turn("chain", sentences)


def _attribute(rng: random.Random, office: Office) -> Turn:
    entities = office.projects if rng.random() < 0.2 else office.people
    entity = rng.choice(entities)
    field = rng.choice(office.fields_of(entity.kind))
    start = rng.choice(_ATTRIBUTE_FORMS)
    question = _Question(start).add_nouns([field.noun]).add(" of").add_names([entity.name])
    question.add("?" if start.startswith("What") else ".")
    return question.turn("attribute", [_sentence(entity, [field])])


def _tool(rng: random.Random, office: Office) -> Turn:
    noun = rng.choice(("phone", "phone", "place", "note"))
    subjects = rng.sample(office.people, 2 if rng.random() < 0.4 else 1)
    start, other_start, glue = _TOOL_FORMS[noun]
    start = rng.choice((start, other_start))
    question = _Question(start).add_nouns([noun]).add(glue)
    question.add_names([person.name for person in subjects])
    question.add("?" if start.startswith("What") else ".")
    calls, sentences = [], []
    for person in subjects:
        call = _call(noun, int(person.facts["badge"]), int(person.facts["room"]))
        calls.append(call)
        sentences.append(_result_sentence(person, noun, call.result))
    return question.turn("tool", sentences, calls)


def _call(noun: str, badge: int, room: int) -> ToolUse:
    if noun == "phone":
        return ToolUse("find_phone", {"badge": badge}, office_tools.find_phone(badge))
    if noun == "place":
        return ToolUse("check_room", {"room": room}, office_tools.check_room(room))
    arguments = {"badge": badge, "room": room}
    return ToolUse("send_note", arguments, office_tools.send_note(badge, room))


def _result_sentence(person: Entity, noun: str, result: str) -> Sentence:
    """ "Mara keeps badge 412 and gets phone 231."; what the tool said follows its argument."""
    key, joiner = ("room", " which") if noun == "place" else ("badge", " and")
    known = next(field for field in PERSON_FIELDS if field.key == key)
    words = result.split(" ")
    said = tuple(f" {word}" for word in words[2:])
    opening = statement(person, [known])[:-1]
    return Sentence((*opening, joiner, *said, "."), person.name, (key, noun))


_MAKERS: dict[str, Callable[[random.Random, Office], Turn]] = {
    "report": _report,
    "chain": _chain,
    "attribute": _attribute,
    "tool": _tool,
}
