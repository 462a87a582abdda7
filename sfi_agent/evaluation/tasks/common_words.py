"""Common words: which ten words of a long list occur most often (structure of RULER's CWE).

The answer needs all of the list, so this is a task that sparse decoding should be worst at.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["CommonWords"]

_COMMON = 10
_NEW_TOKENS = 120
_SHORT_BELOW_TOKENS = 4096
_QUESTION = "Which ten words occur most often in the list?"
_PREFIX = "The ten words that occur most often in the list are:"


@dataclass(frozen=True, slots=True)
class _Repeats:
    """How often words occur: the ten common ones, and all others."""

    common: int
    other: int


@dataclass(frozen=True, slots=True)
class CommonWords:
    """Ten words among others that are rarer."""

    name: str = "common_words"
    summary: str = "Name the ten most frequent words of a shuffled list."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. Cases below 4,096 tokens repeat words less often."""
        check_arguments(context_tokens, seed)
        short = context_tokens < _SHORT_BELOW_TOKENS
        repeats = _Repeats(6, 1) if short else _Repeats(30, 3)
        shown = _Repeats(3, 1) if short else _Repeats(10, 3)
        rng = random.Random(f"{self.name}:{seed}")
        drawn = words.Draws(words.distinct(words.pseudo_word, rng))
        example_words = drawn.first(20 if short else 40)
        example_order = random.Random(f"{self.name}:{seed}:example")
        example_list = _numbered(_shuffled_list(example_order, example_words, shown))
        example_answer = _numbered(example_words[:_COMMON])
        example = f"{example_list}\n\n{_QUESTION}\n{_PREFIX} {example_answer}"
        skipped = len(example_words)
        common = tuple(drawn.first(skipped + _COMMON)[skipped:])
        answer = _numbered(common)
        limit = answer_tokens(answer, count_tokens, _NEW_TOKENS)
        turn = Turn(_QUESTION, _PREFIX, common, limit, answer)

        def build(units: int) -> Case:
            chosen = drawn.first(skipped + units)[skipped:]
            order = random.Random(f"{self.name}:{seed}:order")
            text = _numbered(_shuffled_list(order, chosen, repeats))
            context = f"Some words occur more often than others in this list.\n{example}\n\n"
            context += f"Here is another list, where the same is asked.\n{text}"
            return Case(self.name, seed, "", context, (turn,))

        return fit_case(
            build,
            context_tokens=context_tokens,
            count_tokens=count_tokens,
            smallest=_COMMON + 1,
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Words that occur in the output, ignoring case."""
        return contained(turn.references, output, ignore_case=True)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the ten words that occur in the output."""
        return score_of(self.part_results(turn, output))


def _shuffled_list(rng: random.Random, chosen: Sequence[str], repeats: _Repeats) -> list[str]:
    listed = [word for word in chosen[:_COMMON] for _ in range(repeats.common)]
    listed += [word for word in chosen[_COMMON:] for _ in range(repeats.other)]
    rng.shuffle(listed)
    return listed


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
