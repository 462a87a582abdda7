"""Questions about an office log with the answers, sentence by sentence, that are right.

`make_turn` draws one question of a given kind:

- report: several facts of several entries, one sentence per entry;
- chain: follow links from entry to entry, one sentence per hop, then one fact of the last;
- attribute: one fact of one entry;
- tool: needs one or two tool calls with arguments out of the log, then an answer from the result.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sfi_agent.embedded import office_tools
from sfi_agent.embedded.fragments import Entity, name_fragments, sentence_fragments
from sfi_agent.embedded.lexicon import Field
from sfi_agent.embedded.world import Office

__all__ = ["KINDS", "REQUIRED_FIELDS", "ToolUse", "Turn", "make_turn", "number_fragments"]

KINDS = ("report", "chain", "attribute", "tool")
REQUIRED_FIELDS: dict[str, frozenset[str]] = {"tool": frozenset({"badge", "room"})}
"""Person fields that a log must have for questions of a kind."""

_REPORT_FORMS = (
    ("Report the", " of"),
    ("Write a report with the", " of"),
    ("Give me the", " for"),
)
_CHAIN_FORMS = (("Start with", ", go to the", " and give the"), ("From", " follow the", " to the"))
_ATTRIBUTE_FORMS = ("What is the", "Tell me the", "Look up the")
_SEPARATE = re.compile(r"(\d+)")


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
class Turn:
    """One question, the tool calls it needs, and the sentences of its answer, as fragments."""

    kind: str
    question: tuple[str, ...]
    calls: tuple[ToolUse, ...]
    sentences: tuple[tuple[str, ...], ...]


def number_fragments(text: str) -> list[str]:
    """Text cut before and after its numbers, which are token borders."""
    return [piece for piece in _SEPARATE.split(text) if piece]


def make_turn(rng: random.Random, office: Office, kind: str) -> Turn:
    """Draw one question of this kind over the office.

    Raises:
        KeyError: The kind is unknown, or the log lacks one of its `REQUIRED_FIELDS`.
    """
    return _MAKERS[kind](rng, office)


def _enumeration(parts: list[list[str]]) -> list[str]:
    """ "a", "a and b", "a, b and c"."""
    result: list[str] = []
    for index, part in enumerate(parts):
        if index:
            result.append(" and" if index == len(parts) - 1 else ",")
        result.extend(part)
    return result


def _nouns(fields: list[Field]) -> list[str]:
    return _enumeration([[" " + field.noun] for field in fields])


def _report(rng: random.Random, office: Office) -> Turn:
    projects = len(office.projects) > 2 and rng.random() < 0.2
    entities = office.projects if projects else office.people
    fields = office.project_fields if projects else office.person_fields
    asked = rng.sample(fields, min(len(fields), rng.choice((4, 5, 5, 5, 6))))
    subjects = rng.sample(entities, min(len(entities), rng.choice((2, 3, 3, 4, 4, 5, 6))))
    start, glue = rng.choice(_REPORT_FORMS)
    question = [start, *_nouns(asked), glue]
    question.extend(_enumeration([name_fragments(entity.name) for entity in subjects]))
    question.append(".")
    sentences = tuple(tuple(sentence_fragments(entity, asked)) for entity in subjects)
    return Turn("report", tuple(question), (), sentences)


def _chain(rng: random.Random, office: Office) -> Turn:
    person = rng.choice(office.people)
    person_links = [field for field in office.person_fields if field.link == "person"]
    project_link = [field for field in office.person_fields if field.link == "project"]
    links = [rng.choice(person_links) for _ in range(rng.choice((1, 2, 2, 3)))]
    if project_link and rng.random() < 0.3:
        links[-1] = project_link[0]
    current: Entity = person
    sentences = []
    for link in links:
        sentences.append(tuple(sentence_fragments(current, [link])))
        current = office.entity(current.facts[link.key])
    asked = rng.choice([f for f in office.fields_of(current.kind) if not f.link])
    sentences.append(tuple(sentence_fragments(current, [asked])))
    start, middle, end = rng.choice(_CHAIN_FORMS)
    question = [start, *name_fragments(person.name), middle]
    for index, link in enumerate(links):
        question.extend([",", " the"] if index else [])
        question.append(" " + link.noun)
    question.extend([end, " " + asked.noun, "."])
    return Turn("chain", tuple(question), (), tuple(sentences))


def _attribute(rng: random.Random, office: Office) -> Turn:
    entities = office.projects if rng.random() < 0.2 else office.people
    entity = rng.choice(entities)
    field = rng.choice(office.fields_of(entity.kind))
    start = rng.choice(_ATTRIBUTE_FORMS)
    mark = "?" if start.startswith("What") else "."
    question = (start, " " + field.noun, " of", *name_fragments(entity.name), mark)
    return Turn("attribute", question, (), (tuple(sentence_fragments(entity, [field])),))


def _tool(rng: random.Random, office: Office) -> Turn:
    maker = rng.choice((_phone, _phone, _room, _note))
    subjects = rng.sample(office.people, 2 if rng.random() < 0.35 else 1)
    return maker(rng, subjects)


def _phone(rng: random.Random, subjects: list[Entity]) -> Turn:
    plural = len(subjects) > 1
    names = _enumeration([name_fragments(person.name) for person in subjects])
    start = rng.choice(("What is the", "Find the"))
    if plural:
        start = start.replace("is", "are")
    noun = " phone numbers" if plural else " phone number"
    question = (start, noun, " of", *names, "?" if start.startswith("What") else ".")
    calls, sentences = [], []
    for person in subjects:
        badge = person.facts["badge"]
        result = office_tools.find_phone(badge)
        calls.append(ToolUse("find_phone", {"badge": badge}, result))
        number = result.removeprefix("phone")
        sentences.append(
            (*name_fragments(person.name), " keeps badge", f" {badge}", " and has phone", number)
            + (".",)
        )
    return Turn("tool", question, tuple(calls), tuple(sentences))


def _room(rng: random.Random, subjects: list[Entity]) -> Turn:
    plural = len(subjects) > 1
    names = _enumeration([name_fragments(person.name) for person in subjects])
    question = ("Are the rooms of" if plural else "Is the room of", *names, " free", "?")
    calls, sentences = [], []
    for person in subjects:
        room = int(person.facts["room"])
        result = office_tools.check_room(room)
        calls.append(ToolUse("check_room", {"room": room}, result))
        state = number_fragments(result.removeprefix(f"room {room}"))
        sentences.append(
            (*name_fragments(person.name), " sits in room", f" {room}", " which", *state, ".")
        )
    return Turn("tool", question, tuple(calls), tuple(sentences))


def _note(rng: random.Random, subjects: list[Entity]) -> Turn:
    names = _enumeration([name_fragments(person.name) for person in subjects])
    question = (rng.choice(("Send a note to", "Please send a note to")), *names, ".")
    calls, sentences = [], []
    for person in subjects:
        badge, room = person.facts["badge"], int(person.facts["room"])
        result = office_tools.send_note(badge, room)
        calls.append(ToolUse("send_note", {"badge": badge, "room": room}, result))
        number = result.split(" ")[1]
        sentences.append(
            (*name_fragments(person.name), " in room", f" {room}", " gets note", f" {number}", ".")
        )
    return Turn("tool", question, tuple(calls), tuple(sentences))


_MAKERS = {"report": _report, "chain": _chain, "attribute": _attribute, "tool": _tool}
