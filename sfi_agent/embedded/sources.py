"""Where each token of an answer comes from: the targets of the attention supervision.

The generator of a document knows for every token that the assistant writes which earlier token
it follows from. `SourceNotes` collects this as (row, targets): the query at position `row`,
which predicts the token after it, should attend to one of the `targets`. Six roles:

- bind: a token of a statement attends to the name it is about, a token of a tool call to the
  start of that call;
- plan: what comes next, read in the question: the next noun, or the token after a noun;
- name: who comes next, read in the question: the next name, or the token after the last one;
- value: the fact itself, in the log, in an earlier answer or in a tool result;
- spread: at a subject, all values that the log states of it (so that what a sentence will need
  is known where the sentence starts);
- missing: where the fact stands nowhere, the name at the start of the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sfi_agent.embedded.fragments import value_index
from sfi_agent.embedded.questions import Sentence, Turn

__all__ = ["ROLES", "QuestionSpan", "SourceNotes"]

ROLES = ("bind", "plan", "name", "value", "spread", "missing")
MAX_TARGETS = 8
_OFFERED_BACK = 5
"""From the end of a generation prompt back to the last token of the message before it."""


@dataclass(frozen=True, slots=True)
class QuestionSpan:
    """Token positions of a question: of each noun, of each name."""

    nouns: tuple[int, ...]
    names: tuple[int, ...]


@dataclass
class SourceNotes:
    """Rows and targets per role, and where every known fact stands in the document so far.

    Attributes:
        rows: Role to (row, targets), in the order in which they were noted.
        values: (subject, field key) to the positions at which the fact stands.
        logged: Subject to the positions of all its values in the log.
        guesses: How many facts were asked for that stand nowhere.
    """

    rows: dict[str, list[tuple[int, tuple[int, ...]]]] = field(
        default_factory=lambda: {role: [] for role in ROLES}
    )
    values: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    logged: dict[str, list[int]] = field(default_factory=dict)
    guesses: int = 0

    def add(self, role: str, row: int, *targets: int) -> None:
        self.rows[role].append((row, targets[:MAX_TARGETS]))

    def log_line(self, subject: str, keys: Sequence[str], starts: Sequence[int]) -> None:
        """A statement of the log; `starts` are the positions of its fragments."""
        self._bind(starts)
        for index, key in enumerate(keys):
            position = starts[value_index(index)]
            self.values.setdefault((subject, key), []).append(position)
            self.logged.setdefault(subject, []).append(position)

    def result(self, key: str, starts: Sequence[int], number: str) -> None:
        """A tool result "badge 412 gets phone 231" as five tokens."""
        self._bind(starts[1:])
        self.values.setdefault((number, key), []).append(starts[4])

    def opening(self, row: int, question: QuestionSpan) -> None:
        """The last token of a generation prompt."""
        self.add("bind", row, row - _OFFERED_BACK)
        self.add("plan", row, question.nouns[0])
        if question.names:
            self.add("name", row, question.names[0])

    def call(self, start: int, end: int, question: QuestionSpan) -> None:
        """All tokens of one call, from its opening tag to its closing tag (`end` excluded)."""
        for row in range(start, end):
            self.add("bind", row, start)
            self.add("plan", row, question.nouns[0])

    def call_argument(self, row: int, name_position: int, subject: str, key: str) -> None:
        """The token before an argument that is a fact of the log."""
        self.add("name", row, name_position)
        self._find(row, subject, key, missing=name_position)

    def sentence(
        self,
        sentence: Sentence,
        starts: Sequence[int],
        turn: Turn,
        question: QuestionSpan,
        index: int,
    ) -> None:
        """Sentence number `index` of an answer, written at `starts`."""
        asked = [turn.question[noun].strip() for noun in turn.nouns]
        first = question.nouns[index if turn.kind == "chain" else 0]
        self._bind(starts)
        self.add("plan", starts[0], first)
        if sentence.subject in self.logged:
            self.add("spread", starts[0], *self.logged[sentence.subject])
        for fact, key in enumerate(sentence.keys):
            value = starts[value_index(fact)]
            known = key in asked
            noun = question.nouns[asked.index(key)] if known else first
            if fact and turn.kind == "tool":
                number = sentence.fragments[value_index(0)].strip()
                self.rows["bind"].remove((value - 1, (starts[0],)))
                self.add("bind", value - 1, starts[value_index(0)])
                self._find(value - 1, number, key, missing=starts[0])
            else:
                self._find(value - 1, sentence.subject, key, missing=starts[0])
            after = noun + 1 if known else noun
            self.add("plan", value, after)
            if fact + 1 < len(sentence.keys):
                self.add("plan", value + 1, noun + 2 if known else noun)
            else:
                self.add("plan", value + 1, after)
            self.values.setdefault((sentence.subject, key), []).append(value)
        self._next_subject(starts[-1], turn, question, index)

    def _find(self, row: int, subject: str, key: str, *, missing: int) -> None:
        known = self.values.get((subject, key))
        if known:
            self.add("value", row, *known)
        else:
            self.add("missing", row, missing)
            self.guesses += 1

    def _next_subject(self, stop: int, turn: Turn, question: QuestionSpan, index: int) -> None:
        if turn.kind == "chain":
            if index + 1 < len(turn.sentences):
                self.add("value", stop, stop - 1)
            return
        names = question.names
        following = names[index + 1] if index + 1 < len(names) else names[index] + 1
        self.add("name", stop, following)

    def _bind(self, starts: Sequence[int]) -> None:
        for row in starts:
            self.add("bind", row, starts[0])
