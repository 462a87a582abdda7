"""Cases and conversations: what tests, evaluation and the demo ask the embedded model.

A case is one question over one log; a conversation asks several over the same log. Both follow
from their seed alone. The random stream of a case is keyed by text that starts with "case" or
"conversation", the one of training documents by text that starts with "train": no seed given
here can reproduce a training document.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.embedded.fragments import approximate_tokens
from sfi_agent.embedded.office_tools import make_tools
from sfi_agent.embedded.questions import KINDS, REQUIRED_FIELDS, ToolUse, Turn, make_turn
from sfi_agent.embedded.world import VARIANTS, make_office
from sfi_agent.errors import InputError, explain

__all__ = ["Case", "CaseScore", "Conversation", "make_case", "make_conversation", "score"]

_SENTENCE = re.compile(r"[^.]+\.?")


@dataclass(frozen=True, slots=True)
class Case:
    """One question over one log, and the only right answer.

    Attributes:
        seed: What the case was made from.
        kind: "report", "chain", "attribute" or "tool".
        variant: "easy" (all facts of an entry in one line) or "hard" (scattered).
        log: The office log, header line first.
        question: What the user asks.
        calls: Tool calls expected before the answer, in order, with the results they give;
            empty unless the kind is "tool".
        expected: The answer, without a leading space.
        sentences: The sentences of `expected`, in order.
    """

    seed: int
    kind: str
    variant: str
    log: str
    question: str
    calls: tuple[ToolUse, ...]
    expected: str
    sentences: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Log and question as one user message."""
        return f"{self.log}\n\n{self.question}"

    @property
    def tools(self) -> list[Callable[..., str]]:
        """The tools of the office bound to this log; empty for kinds that need none."""
        return make_tools(self.log) if self.calls else []


@dataclass(frozen=True, slots=True)
class Conversation:
    """Several questions over one log.

    Attributes:
        seed, variant, log: As in `Case`.
        day: Day of the log, the argument of the `open_log` tool.
        turns: The questions, each a case over the same log.
    """

    seed: int
    variant: str
    log: str
    day: str
    turns: tuple[Case, ...]

    @property
    def tools(self) -> list[Callable[..., str]]:
        """The tools of the office bound to this log."""
        return make_tools(self.log)

    @property
    def opening(self) -> str:
        """A first user message that makes the model read the log by a tool call."""
        return f"Open the log of {self.day}."


@dataclass(frozen=True, slots=True)
class CaseScore:
    """How an answer compares with the right one.

    Attributes:
        exact: The whole answer is right, word for word.
        sentences_right: Expected sentences that occur in the answer.
        sentences: Expected sentences in all.
    """

    exact: bool
    sentences_right: int
    sentences: int


def make_case(
    seed: int,
    *,
    kind: str = "report",
    variant: str = "easy",
    log_tokens: int = 4096,
    count: Callable[[str], int] = approximate_tokens,
) -> Case:
    """The case of this seed, kind, variant and log length (in tokens, reached within some 10 %).

    Args:
        count: Token count of a piece of text; the default estimates it without the tokenizer.

    Raises:
        InputError: Unknown kind or variant, or `log_tokens` out of range.
    """
    _check_kind(kind)
    rng = random.Random(f"case:{seed}:{kind}:{variant}:{log_tokens}")
    required = REQUIRED_FIELDS.get(kind, frozenset())
    office = make_office(rng, variant, log_tokens, required=required, count=count)
    return _as_case(seed, variant, office.log, make_turn(rng, office, kind))


def make_conversation(
    seed: int,
    *,
    log_tokens: int = 4096,
    turns: int = 4,
    variant: str = "easy",
    kinds: tuple[str, ...] = KINDS,
    count: Callable[[str], int] = approximate_tokens,
) -> Conversation:
    """Questions of the given kinds, one after the other and from the start again, over one log.

    Raises:
        InputError: Unknown kind or variant, no turn, or `log_tokens` out of range.
    """
    if turns < 1 or not kinds:
        raise InputError(
            explain(
                "Making a conversation",
                got=f"turns {turns!r}, kinds {kinds!r}",
                allowed="at least one turn and one kind",
            )
        )
    for kind in kinds:
        _check_kind(kind)
    rng = random.Random(f"conversation:{seed}:{'/'.join(kinds)}:{variant}:{log_tokens}")
    required = frozenset().union(*(REQUIRED_FIELDS.get(kind, frozenset()) for kind in kinds))
    office = make_office(rng, variant, log_tokens, required=required, count=count)
    log = office.log
    cases = tuple(
        _as_case(seed, variant, log, make_turn(rng, office, kinds[index % len(kinds)]))
        for index in range(turns)
    )
    return Conversation(seed, variant, log, office.day, cases)


def score(case: Case, text: str) -> CaseScore:
    """Compare an answer with the expected one; spaces at both ends do not count.

    A sentence is right when it occurs in the answer word for word; an expected sentence that
    occurs twice must be answered twice.
    """
    answer = text.strip()
    said = [sentence.strip() for sentence in _SENTENCE.findall(answer)]
    right = 0
    for sentence in case.sentences:
        if sentence in said:
            said.remove(sentence)
            right += 1
    return CaseScore(answer == case.expected, right, len(case.sentences))


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(explain("Making a case", got=f"kind {kind!r}", allowed=f"{KINDS}"))


def _as_case(seed: int, variant: str, log: str, turn: Turn) -> Case:
    assert variant in VARIANTS
    sentences = tuple("".join(sentence.fragments).strip() for sentence in turn.sentences)
    return Case(
        seed=seed,
        kind=turn.kind,
        variant=variant,
        log=log,
        question="".join(turn.question),
        calls=turn.calls,
        expected=" ".join(sentences),
        sentences=sentences,
    )
