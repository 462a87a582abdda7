"""Find numbers in a long list over several turns (in the style of SCBench's Math.Find, arXiv
2412.10319): largest, smallest, second largest, median, and how often one occurs.

Every answer needs all of the list; only the first number of the output counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.mt_kv import spread_positions
from sfi_agent.evaluation.tasks.scoring import first_numbers_equal, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["MultiTurnFind"]

_LARGEST = 9999
_SMALLEST_LIST = 11


@dataclass(frozen=True, slots=True)
class MultiTurnFind:
    """Five questions about a list of integers from 1 to 9999."""

    name: str = "mt_find"
    summary: str = "Find extremes, median and counts of a long list of integers."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. The list has an odd length, so that it has a median, and its
        largest, second largest and smallest numbers occur once."""
        check_arguments(context_tokens, seed)

        def build(pairs: int) -> Case:
            numbers = _numbers(random.Random(f"{self.name}:{seed}"), 2 * pairs + 1)
            listed = ", ".join(map(str, numbers))
            context = f"This is a list of {len(numbers)} numbers.\n\n{listed}"
            order = random.Random(f"{self.name}:{seed}:order")
            return Case(self.name, seed, "", context, _turns(order, numbers, count_tokens))

        return fit_case(
            build,
            context_tokens=context_tokens,
            count_tokens=count_tokens,
            smallest=_SMALLEST_LIST // 2,
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Whether the first number of the output is the right one."""
        return first_numbers_equal(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """1 where the first number of the output is the right one, else 0."""
        return score_of(self.part_results(turn, output))


def _numbers(rng: random.Random, count: int) -> list[int]:
    """Random integers, spread among them a smallest and two largest that occur once."""
    low, high = rng.randint(1, 40), rng.randint(_LARGEST - 40, _LARGEST)
    numbers = [rng.randint(low + 1, high - 2) for _ in range(count)]
    extremes = (low, high - 1, high)
    for value, index in zip(extremes, spread_positions(rng, len(extremes), count), strict=True):
        numbers[index] = value
    return numbers


def _turns(
    rng: random.Random, numbers: Sequence[int], count_tokens: TokenCounter
) -> tuple[Turn, ...]:
    ordered = sorted(numbers)
    counted = rng.choice(numbers)
    asked = {
        "largest number in the list": ordered[-1],
        "smallest number in the list": ordered[0],
        "second largest number in the list": ordered[-2],
        "median of the list": ordered[len(ordered) // 2],
        f"number of times that {counted} occurs in the list": ordered.count(counted),
    }
    return tuple(_turn(what, answer, count_tokens) for what, answer in asked.items())


def _turn(what: str, answer: int, count_tokens: TokenCounter) -> Turn:
    limit = answer_tokens(f"{answer}.", count_tokens)
    return Turn(f"What is the {what}?", f"The {what} is", (str(answer),), limit, f"{answer}.")
