"""Writes a conversation as token ids, in the chat template's format, and notes its sources.

Texts come as fragments, whose ids are looked up in a table (fragment borders are token borders),
so a process makes hundreds of thousands of tokens a second without calling the tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfi_agent.embedded import chat_format
from sfi_agent.embedded.fragments import Line, number_fragments
from sfi_agent.embedded.questions import ToolUse, Turn
from sfi_agent.embedded.sources import QuestionSpan, SourceNotes
from sfi_agent.embedded.world import Office

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MESSAGE_END", "DocumentWriter", "FragmentTable"]

MESSAGE_END = f"{chat_format.MESSAGE_CLOSE}\n"


class FragmentTable:
    """Token ids of fragments, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, array[int]] = {}

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


class DocumentWriter:
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

    def log(self, office: Office, lines: Sequence[Line]) -> None:
        """The log of the office, or those of its lines that are to be seen."""
        self.add(office.header)
        for line in lines:
            self.breaks.append(len(self.ids))
            self.add(("\n", office.prefix))
            starts = self.add(line.fragments)
            if line.subject:
                self.notes.log_line(line.subject, line.keys, starts)

    def open_message(self, role: str) -> None:
        """Start a message of the user or the system."""
        if role == "user":
            self.breaks.append(len(self.ids))
        self.add((f"{chat_format.MESSAGE_OPEN}{role}\n",))

    def close_message(self) -> None:
        """End what `open_message` or `open_results` started."""
        self.add((MESSAGE_END,))

    def question(self, turn: Turn) -> QuestionSpan:
        """Write the question; returns where its nouns and names stand."""
        starts = self.add(turn.question)
        return QuestionSpan(
            tuple(starts[noun] for noun in turn.nouns), tuple(starts[name] for name in turn.names)
        )

    def open_answer(self, question: QuestionSpan) -> None:
        """Start a message of the assistant that answers this question."""
        self.add((f"{chat_format.MESSAGE_OPEN}assistant\n",))
        self.notes.opening(len(self.ids) - 1, question)
        self.answers.append((len(self.ids), len(self.ids)))

    def close_answer(self) -> tuple[int, int]:
        """End it; returns the span of what the assistant wrote."""
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
        """Start the message that carries tool results."""
        self.add((f"{chat_format.MESSAGE_OPEN}user",))

    def result(self, text: str) -> None:
        """One result such as "badge 412 gets phone 231"."""
        self.add((f"\n{chat_format.RESULT_OPEN}\n",))
        starts = self.add(_as_words(text))
        words = text.split(" ")
        self.notes.result(words[3] if words[3] != "at" else "place", starts, words[1])
        self.add((f"\n{chat_format.RESULT_CLOSE}",))

    def final_answer(self, turn: Turn, question: QuestionSpan) -> tuple[int, int]:
        """The sentences of the answer; returns their span."""
        self.open_answer(question)
        for index, sentence in enumerate(turn.sentences):
            starts = self.add(sentence.fragments)
            self.notes.sentence(sentence, starts, turn, question, index)
        return self.close_answer()


def _as_words(text: str) -> list[str]:
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]
