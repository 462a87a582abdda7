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
from typing import TYPE_CHECKING, Any

from sfi_agent.embedded import chat_format
from sfi_agent.embedded.office_tools import TOOL_NAMES, make_tools
from sfi_agent.embedded.questions import ToolUse, make_turn, number_fragments
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

_TOOLS_FROM_TOKENS = 1024
"""Shorter documents offer no tools: the signatures alone would fill half of them."""

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
_KIND_WEIGHTS = {"report": 0.42, "chain": 0.22, "attribute": 0.14, "tool": 0.22}


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
    """Token ids of a conversation, and where the model is to answer.

    Attributes:
        ids: Token ids, at most as many as asked for.
        answers: (start, end) spans of tokens that the assistant writes, end-of-turn included.
        turns: (kind, start, end) per question: the span of its final answer.
    """

    ids: array[int]
    answers: list[tuple[int, int]]
    turns: list[tuple[str, int, int]]


class _Writer:
    """Appends messages to a document in the chat template's format."""

    def __init__(self, table: FragmentTable) -> None:
        self._table = table
        self.ids: array[int] = array("H")
        self.answers: list[tuple[int, int]] = []

    def add(self, fragments: Sequence[str]) -> None:
        for fragment in fragments:
            self.ids.extend(self._table.ids(fragment))

    def message(self, role: str, fragments: Sequence[str]) -> None:
        self.add((f"{chat_format.MESSAGE_OPEN}{role}\n", *fragments, _CLOSE))

    def answer(self, fragments: Sequence[str]) -> tuple[int, int]:
        self.add((f"{chat_format.MESSAGE_OPEN}assistant\n",))
        start = len(self.ids)
        self.add((*fragments, chat_format.MESSAGE_CLOSE))
        span = (start, len(self.ids))
        self.answers.append(span)
        self.add(("\n",))
        return span

    def calls(self, uses: Sequence[ToolUse], results: Sequence[Sequence[str]]) -> None:
        call_fragments: list[str] = []
        for index, use in enumerate(uses):
            opening = "\n" if index else ""
            call_fragments.append(f"{opening}{chat_format.CALL_OPEN}\n")
            call_fragments.extend(number_fragments(use.call_json))
            call_fragments.append(f"\n{chat_format.CALL_CLOSE}")
        self.answer(call_fragments)
        self.add((f"{chat_format.MESSAGE_OPEN}user",))
        for result in results:
            self.add((f"\n{chat_format.RESULT_OPEN}\n", *result))
            self.add((f"\n{chat_format.RESULT_CLOSE}",))
        self.add((_CLOSE,))


_CLOSE = f"{chat_format.MESSAGE_CLOSE}\n"


def make_document(key: str, length_tokens: int, table: FragmentTable) -> Document:
    """One training document of at most `length_tokens` tokens, filled with questions to the end.

    Args:
        key: Name of the random stream; documents of different keys are independent.
        length_tokens: Size of the document in tokens.
        table: Token ids of fragments.
    """
    rng = random.Random(f"train:{key}")
    variant = "easy" if rng.random() < 0.55 else "hard"
    with_tools = length_tokens >= _TOOLS_FROM_TOKENS and rng.random() < 0.65
    writer = _Writer(table)
    writer.add(_system(rng, with_tools))
    room = length_tokens - len(writer.ids) - 120
    log_tokens = max(160, min(8600, round(room * rng.uniform(0.3, 0.9))))
    required = frozenset({"badge", "room"}) if with_tools else frozenset[str]()
    office = make_office(rng, variant, log_tokens, required=required, count=table.count)
    opening = _open_log(rng, writer, office, with_tools)
    kinds = [kind for kind in _KIND_WEIGHTS if with_tools or kind != "tool"]
    weights = [_KIND_WEIGHTS[kind] for kind in kinds]
    turns: list[tuple[str, int, int]] = []
    while len(writer.ids) < length_tokens:
        kind = rng.choices(kinds, weights)[0]
        turn = make_turn(rng, office, kind)
        writer.message("user", (*opening, *turn.question))
        opening = ()
        if turn.calls:
            results = [number_fragments(use.result) for use in turn.calls]
            writer.calls(turn.calls, results)
        start, end = writer.answer([piece for part in turn.sentences for piece in part])
        turns.append((kind, start, end))
    answers = [(a, min(b, length_tokens)) for a, b in writer.answers if a < length_tokens]
    complete = [(kind, a, b) for kind, a, b in turns if b <= length_tokens]
    return Document(writer.ids[:length_tokens], answers, complete)


def _open_log(
    rng: random.Random, writer: _Writer, office: Office, with_tools: bool
) -> tuple[str, ...]:
    """Bring the log in, by a tool call or as the start of the next user message (returned)."""
    if with_tools and rng.random() < 0.5:
        writer.message("user", ("Open the log of", f" {office.day}", "."))
        use = ToolUse("open_log", {"day": office.day}, "")
        writer.calls([use], [office.fragments])
        writer.answer((" The log of", f" {office.day}", " is open."))
        return ()
    return (*office.fragments, "\n", "\n")


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


def document_report(document: Document) -> dict[str, Any]:
    """Share of answer tokens and number of questions, for the training log."""
    answered = sum(end - start for start, end in document.answers)
    return {
        "tokens": len(document.ids),
        "answer_share": answered / len(document.ids),
        "turns": len(document.turns),
    }
