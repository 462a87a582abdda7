"""Training documents: whole conversations over one log as token ids with a loss mask.

A document is built from the same fragments as the texts of `cases`; the rendering is the chat
template's, token for token.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sfi_agent.embedded import chat_format
from sfi_agent.embedded.fragments import Line
from sfi_agent.embedded.office_tools import TOOL_NAMES, make_tools
from sfi_agent.embedded.questions import ToolUse, Turn, make_turn
from sfi_agent.embedded.sources import QuestionSpan
from sfi_agent.embedded.world import Office, make_office
from sfi_agent.embedded.writer import MESSAGE_END, DocumentWriter, FragmentTable

__all__ = [
    "DEFAULT_SYSTEM",
    "GUESS",
    "OPENED",
    "SYSTEM_SENTENCES",
    "Document",
    "make_document",
    "tool_schemas",
]

_TOOLS_SHARE = 0.65
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
_KIND_WEIGHTS = {"report": 0.3, "chain": 0.25, "attribute": 0.15, "tool": 0.3}
GUESS = "guess"
"""Kind of a turn that asks for a fact that the log does not state."""
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


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids of a conversation, where the model is to answer, and where answers come from.

    Attributes:
        ids: Token ids, at most as many as asked for.
        answers: (start, end) spans of tokens that the assistant writes, end-of-turn included.
        turns: (kind, start, end) per question: the span of its final answer; the kind is `GUESS`
            when the answer could not be known.
        breaks: Positions at which a line of the log or a user's message starts.
        sources: Role to (row, targets), see `sfi_agent.embedded.sources`.
    """

    ids: array[int]
    answers: list[tuple[int, int]]
    turns: list[tuple[str, int, int]]
    breaks: list[int]
    sources: dict[str, list[tuple[int, tuple[int, ...]]]]


def make_document(
    key: str,
    length_tokens: int,
    table: FragmentTable,
    *,
    log_share: tuple[float, float] = (0.3, 0.9),
    missing_share: float = 0.0,
) -> Document:
    """One training document of `length_tokens` tokens, filled with questions to the end.

    Args:
        key: Name of the random stream; documents of different keys are independent.
        length_tokens: Size of the document in tokens.
        table: Token ids of fragments.
        log_share: Least and greatest share of the document that is the log.
        missing_share: Share of the facts that the log does not state. Asked for one, the
            assistant makes up a value: what is learned from it is to be unsure.
    """
    rng = random.Random(f"train:{key}")
    variant = "easy" if rng.random() < 0.5 else "hard"
    tools = rng.random() < _TOOLS_SHARE
    schemas = tools and length_tokens >= _SCHEMAS_FROM_TOKENS and rng.random() < 0.65
    writer = DocumentWriter(table)
    writer.add(_system(rng, schemas))
    room = length_tokens - len(writer.ids) - 80
    log_tokens = max(160, min(8600, round(room * rng.uniform(*log_share))))
    required = frozenset({"badge", "room"}) if tools else frozenset[str]()
    office = make_office(rng, variant, log_tokens, required=required, count=table.count)
    lines = _leave_out(random.Random(f"missing:{key}"), office, missing_share)
    log_pending = not (tools and rng.random() < 0.4)
    if not log_pending:
        _open_log(writer, office, lines)
    turns: list[tuple[str, int, int]] = []
    while len(writer.ids) < length_tokens:
        turn = make_turn(rng, office, _draw_kind(rng, tools))
        writer.open_message("user")
        if log_pending:
            writer.log(office, lines)
            writer.add(("\n", "\n"))
            writer.breaks.append(len(writer.ids))
            log_pending = False
        guesses = writer.notes.guesses
        span = _converse(writer, turn)
        turns.append((turn.kind if writer.notes.guesses == guesses else GUESS, *span))
    return _cut(writer, turns, length_tokens)


def _draw_kind(rng: random.Random, tools: bool) -> str:
    kinds = [kind for kind in _KIND_WEIGHTS if tools or kind != "tool"]
    return rng.choices(kinds, [_KIND_WEIGHTS[kind] for kind in kinds])[0]


def _converse(writer: DocumentWriter, turn: Turn) -> tuple[int, int]:
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


def _cut(writer: DocumentWriter, turns: list[tuple[str, int, int]], length: int) -> Document:
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


def _leave_out(rng: random.Random, office: Office, share: float) -> list[Line]:
    lines = []
    for line in office.lines:
        dropped = {key for key in line.keys if rng.random() < share}
        left = line.without(dropped)
        if left is not None:
            lines.append(left)
    return lines


def _open_log(writer: DocumentWriter, office: Office, lines: Sequence[Line]) -> None:
    """Bring the log in by a tool call."""
    writer.open_message("user")
    starts = writer.add(("Open the", " log", " of", f" {office.day}", "."))
    question = QuestionSpan((starts[1],), ())
    writer.close_message()
    writer.calls([ToolUse("open_log", {"day": office.day}, "")], question, [])
    writer.open_results()
    writer.add((f"\n{chat_format.RESULT_OPEN}\n",))
    writer.log(office, lines)
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
    return [*parts, MESSAGE_END]


def _as_fragments(text: str) -> list[str]:
    sentences = text.replace(". ", ".| ").split("|")
    return [sentence for sentence in sentences if sentence]


def _offered_tools(rng: random.Random) -> list[str]:
    names = list(TOOL_NAMES)
    if rng.random() < 0.2:
        rng.shuffle(names)
    return names
