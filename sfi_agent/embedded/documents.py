"""Training documents: whole conversations over one log as token ids with a loss mask.

A document is built from the same fragments as the texts of `cases`, tokenised piece by piece
from a table (fragment borders are token borders), so a process makes millions of tokens a
second without calling the tokenizer. The rendering is the chat template's, token for token.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.embedded import chat_format
from sfi_agent.embedded.office_tools import TOOL_NAMES, make_tools
from sfi_agent.embedded.fragments import number_fragments
from sfi_agent.embedded.questions import ToolUse, Turn, make_turn
from sfi_agent.embedded.sources import QuestionSpan, SourceNotes
from sfi_agent.embedded.world import Office, make_office

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "DEFAULT_SYSTEM",
    "SYSTEM_SENTENCES",
    "Document",
    "FragmentTable",
    "make_document",
    "tool_schemas",
]

_TOOLS_SHARE = 0.5
_SCHEMAS_FROM_TOKENS = 768
"""Shorter documents use tools without their signatures, which alone would fill half of them."""

DEFAULT_SYSTEM = "You are the office assistant. Answer from the log."
SYSTEM_SENTENCES = (
    "You are the office assistant.",
    "Answer from the log.",
    "You answer questions about the office.",
    "Be short and exact.",
    "Use the tools when you need them.",
    "Say only what the log says.",
    "You are a careful assistant.",
    "You help the people of the office.",
    "Write full sentences.",
    "Today is a busy day.",
    "Never guess.",
    "The user works at the front desk.",
)
_KIND_WEIGHTS = {"report": 0.3, "chain": 0.25, "attribute": 0.2, "tool": 0.25}
OPENED = " The| log| is| open|."
"""The answer to a request to open the log, as fragments."""


@lru_cache(maxsize=1)
def tool_schemas() -> dict[str, str]:
    """The JSON line of each office tool, as the chat template writes it."""
    from transformers.utils.chat_template_utils import get_json_schema

    return {
        tool.__name__: json.dumps(get_json_schema(tool), ensure_ascii=False)
        for tool in make_tools("")
    }


class FragmentTable:
    """Token ids of fragments, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, array[int]] = {}

    @classmethod
    def from_file(cls, path: Path) -> FragmentTable:
        """Read a saved `tokenizer.json`."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))

    def ids(self, fragment: str) -> array[int]:
        """Token ids of one fragment."""
        known = self._ids.get(fragment)
        if known is None:
            encoded = self._tokenizer.encode(fragment, add_special_tokens=False).ids
            known = self._ids[fragment] = array("H", encoded)
        return known

    def count(self, fragment: str) -> int:
        """Number of tokens of one fragment."""
        return len(self.ids(fragment))


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of a conversation, where the model is to answer, and where answers come from.

    Attributes:
        ids: Token ids, at most as many as asked for.
        answers: (start, end) spans of tokens that the assistant writes, end-of-turn included.
        turns: (kind, start, end) per question: the span of its final answer.
        breaks: Positions at which a line of the log or a user's message starts.
        sources: Role to (row, targets), see `sfi_agent.embedded.sources`.
    """

    ids: array[int]
    answers: list[tuple[int, int]]
    turns: list[tuple[str, int, int]]
    breaks: list[int]
    sources: dict[str, list[tuple[int, tuple[int, ...]]]]


class _Writer:
    """Appends messages to a document in the chat template's format and notes the sources."""

    def __init__(self, table: FragmentTable) -> None:
        self._table = table
        self.ids: array[int] = array("H")
        self.answers: list[tuple[int, int]] = []
        self.breaks: list[int] = []
        self.notes = SourceNotes()

    def add(self, fragments: Sequence[str]) -> list[int]:
        """Append fragments; returns the position at which each starts."""
        starts = []
        for fragment in fragments:
            starts.append(len(self.ids))
            self.ids.extend(self._table.ids(fragment))
        return starts

    def log(self, office: Office) -> None:
        self.add(office.header)
        for line in office.lines:
            self.breaks.append(len(self.ids))
            self.add(("\n", office.prefix))
            starts = self.add(line.fragments)
            if line.subject:
                self.notes.log_line(line.subject, line.keys, starts)

    def open_message(self, role: str) -> None:
        if role == "user":
            self.breaks.append(len(self.ids))
        self.add((f"{chat_format.MESSAGE_OPEN}{role}\n",))

    def close_message(self) -> None:
        self.add((_CLOSE,))

    def question(self, turn: Turn) -> QuestionSpan:
        starts = self.add(turn.question)
        return QuestionSpan(
            tuple(starts[noun] for noun in turn.nouns), tuple(starts[name] for name in turn.names)
        )

    def open_answer(self, question: QuestionSpan) -> None:
        self.add((f"{chat_format.MESSAGE_OPEN}assistant\n",))
        self.notes.opening(len(self.ids) - 1, question)
        self.answers.append((len(self.ids), len(self.ids)))

    def close_answer(self) -> tuple[int, int]:
        self.add((chat_format.MESSAGE_CLOSE,))
        self.answers[-1] = (self.answers[-1][0], len(self.ids))
        self.add(("\n",))
        return self.answers[-1]

    def calls(self, uses: Sequence[ToolUse], question: QuestionSpan, subjects: list[str]) -> None:
        """The assistant's message that makes the calls."""
        self.open_answer(question)
        for index, use in enumerate(uses):
            self.add(("\n",) if index else ())
            start = len(self.ids)
            self.add((f"{chat_format.CALL_OPEN}\n",))
            arguments = iter(use.arguments)
            for piece in number_fragments(use.call_json):
                if piece.strip().isdigit():
                    self.notes.call_argument(
                        len(self.ids) - 1, question.names[index], subjects[index], next(arguments)
                    )
                self.add((piece,))
            self.add((f"\n{chat_format.CALL_CLOSE}",))
            self.notes.call(start, len(self.ids), question)
            if question.names:
                self.notes.add("name", len(self.ids) - 1, question.names[index] + 1)
        self.close_answer()

    def open_results(self) -> None:
        self.add((f"{chat_format.MESSAGE_OPEN}user",))

    def result(self, text: str) -> None:
        self.add((f"\n{chat_format.RESULT_OPEN}\n",))
        starts = self.add(_as_words(text))
        words = text.split(" ")
        self.notes.result(words[3] if words[3] != "at" else "place", starts, words[1])
        self.add((f"\n{chat_format.RESULT_CLOSE}",))

    def final_answer(self, turn: Turn, question: QuestionSpan) -> tuple[int, int]:
        self.open_answer(question)
        for index, sentence in enumerate(turn.sentences):
            starts = self.add(sentence.fragments)
            self.notes.sentence(sentence, starts, turn, question, index)
        return self.close_answer()


_CLOSE = f"{chat_format.MESSAGE_CLOSE}\n"


def _as_words(text: str) -> list[str]:
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


def make_document(
    key: str, length_tokens: int, table: FragmentTable, *, log_share: tuple[float, float] = (0.3, 0.9)
) -> Document:
    """One training document of `length_tokens` tokens, filled with questions to the end.

    Args:
        key: Name of the random stream; documents of different keys are independent.
        length_tokens: Size of the document in tokens.
        table: Token ids of fragments.
        log_share: Least and greatest share of the document that is the log.
    """
    rng = random.Random(f"train:{key}")
    variant = "easy" if rng.random() < 0.5 else "hard"
    tools = rng.random() < _TOOLS_SHARE
    schemas = tools and length_tokens >= _SCHEMAS_FROM_TOKENS and rng.random() < 0.65
    writer = _Writer(table)
    writer.add(_system(rng, schemas))
    room = length_tokens - len(writer.ids) - 80
    log_tokens = max(160, min(8600, round(room * rng.uniform(*log_share))))
    required = frozenset({"badge", "room"}) if tools else frozenset[str]()
    office = make_office(rng, variant, log_tokens, required=required, count=table.count)
    log_pending = not (tools and rng.random() < 0.4)
    if not log_pending:
        _open_log(writer, office)
    kinds = [kind for kind in _KIND_WEIGHTS if tools or kind != "tool"]
    weights = [_KIND_WEIGHTS[kind] for kind in kinds]
    turns: list[tuple[str, int, int]] = []
    while len(writer.ids) < length_tokens:
        turn = make_turn(rng, office, rng.choices(kinds, weights)[0])
        writer.open_message("user")
        if log_pending:
            writer.log(office)
            writer.add(("\n", "\n"))
            writer.breaks.append(len(writer.ids))
            log_pending = False
        turns.append((turn.kind, *_converse(writer, turn)))
    return _cut(writer, turns, length_tokens)


def _converse(writer: _Writer, turn: Turn) -> tuple[int, int]:
    """The rest of the user's message and everything up to the final answer, whose span it is."""
    question = writer.question(turn)
    writer.close_message()
    if turn.calls:
        subjects = [sentence.subject for sentence in turn.sentences]
        writer.calls(turn.calls, question, subjects)
        writer.open_results()
        for use in turn.calls:
            writer.result(use.result)
        writer.close_message()
    return writer.final_answer(turn, question)


def _cut(writer: _Writer, turns: list[tuple[str, int, int]], length: int) -> Document:
    return Document(
        writer.ids[:length],
        [(start, min(end, length)) for start, end in writer.answers if start < length],
        [(kind, start, end) for kind, start, end in turns if end <= length],
        [position for position in writer.breaks if position < length],
        {
            role: [(row, targets) for row, targets in rows if row < length - 1]
            for role, rows in writer.notes.rows.items()
        },
    )


def _open_log(writer: _Writer, office: Office) -> None:
    """Bring the log in by a tool call."""
    writer.open_message("user")
    starts = writer.add(("Open the", " log", " of", f" {office.day}", "."))
    question = QuestionSpan((starts[1],), ())
    writer.close_message()
    writer.calls([ToolUse("open_log", {"day": office.day}, "")], question, [])
    writer.open_results()
    writer.add((f"\n{chat_format.RESULT_OPEN}\n",))
    writer.log(office)
    writer.add((f"\n{chat_format.RESULT_CLOSE}",))
    writer.close_message()
    writer.open_answer(question)
    writer.add(OPENED.split("|"))
    writer.close_answer()


def _system(rng: random.Random, with_tools: bool) -> list[str]:
    draw = rng.random()
    if draw < 0.4:
        text = DEFAULT_SYSTEM
    elif draw < 0.75:
        text = " ".join(rng.sample(SYSTEM_SENTENCES, rng.randint(1, 4)))
    else:
        text = ""
    words = _as_fragments(text)
    if not with_tools and not text:
        return []
    parts = [f"{chat_format.MESSAGE_OPEN}system\n", *words]
    if with_tools:
        parts.extend(["\n", "\n"] if text else [])
        parts.append(chat_format.TOOLS_BEFORE)
        for name in _offered_tools(rng):
            parts.extend(("\n", tool_schemas()[name]))
        parts.append(chat_format.TOOLS_AFTER)
    return [*parts, _CLOSE]


def _as_fragments(text: str) -> list[str]:
    sentences = text.replace(". ", ".| ").split("|")
    return [sentence for sentence in sentences if sentence]


def _offered_tools(rng: random.Random) -> list[str]:
    names = list(TOOL_NAMES)
    if rng.random() < 0.2:
        rng.shuffle(names)
    return names
