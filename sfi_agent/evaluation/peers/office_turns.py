"""Conversations of the office world: a log and questions about it, over several turns.

`OfficeConversation` asks whether the second, third and fourth question about a log is answered as
well as the first, when earlier answers and the decoding policy have worked on the history.
`OfficeLateLog` brings the long log only in the second message, as a tool result would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.embedded import DEFAULT_SYSTEM, make_case, make_conversation
from sfi_agent.embedded import Case as OfficeCase
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.tasks.scoring import sentences_said
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["OfficeConversation", "OfficeLateLog"]

_ANSWER_TOKENS = 256
_SHORT_LOG_TOKENS = 300
_MESSAGE_TOKENS = 8
"""What a chat template puts around one message, at most, on the embedded model."""
_ATTEMPTS = 32


@dataclass(frozen=True, slots=True)
class OfficeConversation:
    """Reports over one log, one per turn; a part is a sentence, right when it is word for word.

    Attributes:
        variant: "easy" (all facts of a person in one line) or "hard" (scattered).
        turns: Questions per case, at least 1.
    """

    variant: str
    turns: int = 4

    @property
    def name(self) -> str:
        """What users write."""
        return f"office_conversation_{self.variant}"

    @property
    def summary(self) -> str:
        """What it measures, as one sentence."""
        return f"{self.turns} reports, one per turn, over one {self.variant} office log."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`.

        Raises:
            InputError: The log would be shorter than an office log can be.
        """

        def make(log_tokens: int) -> Case:
            office = make_conversation(
                seed,
                log_tokens=log_tokens,
                turns=self.turns,
                variant=self.variant,
                kinds=("report",),
                count=count_tokens,
            )
            turns = tuple(_turn(case.question, case) for case in office.turns)
            return Case(self.name, seed, DEFAULT_SYSTEM, office.log, turns)

        return _fitting(self.name, make, context_tokens, count_tokens)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Which of the expected sentences the answer has."""
        return sentences_said(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Expected sentences that occur in the answer; exact when nothing else does."""
        return _score(turn, output)


@dataclass(frozen=True, slots=True)
class OfficeLateLog:
    """A report over a short log, then a message with a long log and a report over that.

    Attributes:
        variant: As in `OfficeConversation`.
    """

    variant: str

    @property
    def name(self) -> str:
        """What users write."""
        return f"office_late_log_{self.variant}"

    @property
    def summary(self) -> str:
        """What it measures, as one sentence."""
        return f"A report over a short {self.variant} log, then one over a long log that follows."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`.

        Raises:
            InputError: The long log would be shorter than an office log can be.
        """

        def one(log_tokens: int) -> OfficeCase:
            return make_case(seed, variant=self.variant, log_tokens=log_tokens, count=count_tokens)

        short = one(_SHORT_LOG_TOKENS)

        def make(log_tokens: int) -> Case:
            long = one(log_tokens)
            turns = (_turn(short.question, short), _turn(long.prompt, long))
            return Case(self.name, seed, DEFAULT_SYSTEM, short.log, turns)

        return _fitting(self.name, make, context_tokens, count_tokens)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Which of the expected sentences the answer has."""
        return sentences_said(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Expected sentences that occur in the answer; exact when nothing else does."""
        return _score(turn, output)


def _turn(question: str, case: OfficeCase) -> Turn:
    return Turn(question, "", case.sentences, _ANSWER_TOKENS, answer=case.expected)


def _fitting(
    name: str, make: Callable[[int], Case], context_tokens: int, count_tokens: TokenCounter
) -> Case:
    """The case with the longest log found whose texts fit, from a log of all tokens downwards."""
    log_tokens = context_tokens
    for _ in range(_ATTEMPTS):
        case = make(log_tokens)
        texts = [case.system, case.context]
        for turn in case.turns:
            texts += [turn.question, turn.reference_answer]
        total = sum(count_tokens(text) + _MESSAGE_TOKENS for text in texts)
        if total <= context_tokens:
            return case
        log_tokens -= total - context_tokens
    raise InputError(
        explain(
            f"Making a case of {name}",
            got=f"context_tokens {context_tokens!r}",
            remedy="Ask for more context tokens",
        )
    )


def _score(turn: Turn, output: str) -> Score:
    parts = sentences_said(turn.references, output)
    return Score(sum(parts), len(parts), output.strip() == turn.reference_answer)
