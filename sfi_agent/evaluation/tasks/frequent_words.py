"""Frequent words: the most frequent strings of a coded text (structure of RULER's FWE).

Frequencies follow a zeta distribution with exponent 2: the word of rank r occurs
floor(N * r**-2 / zeta(2)) times, so that ranks 2, 3 and 4 have 15, 7 and 4 percent of the text.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["FrequentWords", "occurrences"]

_NEW_TOKENS = 50
_WORD_LETTERS = 6
_TOKENS_PER_WORD = 50
_ASKED = 3
_ZETA_2 = math.pi**2 / 6
_SMALLEST_TEXT = 110
"""Words from which on the four first ranks have four different numbers of occurrences that are
well apart."""
_QUESTION = (
    "The text above is in a code. Leave the dots aside: which three of its words occur most often?"
)
_PREFIX = "Leaving the dots aside, the three words that occur most often are"


def occurrences(rank: int, total: int) -> int:
    """How often the word of a rank (from 1) occurs in a text of about `total` words."""
    return int(total / (rank * rank * _ZETA_2))


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """Coded words with zeta-distributed frequencies; dots are the most frequent of them."""

    name: str = "frequent_words"
    summary: str = "Name the three most frequent words of a text of random strings."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        source = words.distinct(lambda r: words.letters(r, _WORD_LETTERS), rng)
        vocabulary = [
            next(source) for _ in range(max(_ASKED + 1, context_tokens // _TOKENS_PER_WORD))
        ]
        ranked = ["...", *vocabulary[1:]]
        references = tuple(ranked[1 : _ASKED + 1])
        answer = ", ".join(references)
        limit = answer_tokens(answer, count_tokens, _NEW_TOKENS)
        turn = Turn(_QUESTION, _PREFIX, references, limit, answer)

        def build(units: int) -> Case:
            text = [
                word
                for rank, word in enumerate(ranked, start=1)
                for _ in range(occurrences(rank, units))
            ]
            random.Random(f"{self.name}:{seed}:order").shuffle(text)
            return Case(self.name, seed, "", " ".join(text), (turn,))

        return fit_case(
            build,
            context_tokens=context_tokens,
            count_tokens=count_tokens,
            smallest=_SMALLEST_TEXT,
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Words that occur in the output, ignoring case."""
        return contained(turn.references, output, ignore_case=True)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the three words that occur in the output."""
        return score_of(self.part_results(turn, output))
