"""Find strings by how they begin and end, over several turns (in the style of SCBench's
Retr.Prefix-Suffix, arXiv 2412.10319)."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.mt_kv import spread_positions
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["MultiTurnPrefixSuffix", "coded_strings", "prefix_suffix_turn"]

_ENDS = 6
_CHARACTERS = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True)
class MultiTurnPrefixSuffix:
    """Random strings, one per line; each turn names both ends of one."""

    name: str = "mt_prefix_suffix"
    summary: str = "Find random strings by their first and last characters, turn after turn."
    turns: int = 5

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        drawn = words.Draws(coded_strings(random.Random(f"{self.name}:{seed}")))

        def build(units: int) -> Case:
            lines = drawn.first(units)
            place = random.Random(f"{self.name}:{seed}:positions")
            asked = [lines[index] for index in spread_positions(place, self.turns, units)]
            turns = tuple(prefix_suffix_turn(text, count_tokens) for text in asked)
            return Case(self.name, seed, "", describe_strings(lines), turns)

        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=self.turns
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Whether the string occurs in the output."""
        return contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """1 where the string occurs in the output, else 0."""
        return score_of(self.part_results(turn, output))


def describe_strings(lines: Sequence[str]) -> str:
    """The context that holds the strings."""
    listed = "\n".join(lines)
    return f"Each of these lines is one string.\n\n{listed}"


def coded_strings(rng: random.Random) -> Iterator[str]:
    """Endless strings of 24 to 48 letters and digits, no two with equal ends."""
    for ends in words.distinct(lambda source: words.letters(source, 2 * _ENDS, _CHARACTERS), rng):
        middle = words.letters(rng, rng.randint(24, 48) - 2 * _ENDS, _CHARACTERS)
        yield f"{ends[:_ENDS]}{middle}{ends[_ENDS:]}"


def prefix_suffix_turn(text: str, count_tokens: TokenCounter) -> Turn:
    """Ask for a string by its ends."""
    ends = f"begins with {text[:_ENDS]} and ends with {text[-_ENDS:]}"
    question = f"Which of the strings {ends}? Write all of it."
    return Turn(
        question,
        f"The string that {ends} is",
        (text,),
        answer_tokens(f"{text}.", count_tokens),
        f"{text}.",
    )
