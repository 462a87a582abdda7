"""Four needles in a haystack of needles, keys and values alike random codes.

The structure is the hard retrieval task of the Sparse Frontier study (arXiv 2504.17768): nothing
in the text is easier to skip than anything else, and keys share no word with the question but
themselves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import numbered_equal, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["HardNeedles"]

_QUERIES = 4


@dataclass(frozen=True, slots=True)
class HardNeedles:
    """Numbered look-ups of codes by codes."""

    name: str = "niah_hard"
    summary: str = "Look up four random codes by random codes in a text of nothing else."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        codes = words.Draws(words.distinct(words.code_group_key, rng))

        def build(units: int) -> Case:
            drawn = codes.first(2 * units)
            pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
            asked = pairs[:_QUERIES]
            random.Random(f"{self.name}:{seed}:order").shuffle(pairs)
            lines = "\n".join(f"Locker {key} holds {value}." for key, value in pairs)
            return Case(self.name, seed, "", lines, (_turn(asked, count_tokens),))

        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=_QUERIES
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Values that stand behind the number of their key, exactly."""
        return numbered_equal(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the values that stand behind the number of their key."""
        return score_of(self.part_results(turn, output))


def _turn(asked: list[tuple[str, str]], count_tokens: TokenCounter) -> Turn:
    keys = "\n".join(f"{number}. {key}" for number, (key, _) in enumerate(asked, start=1))
    question = (
        "What do these lockers hold? Answer with one line per locker: its number in this list, "
        f"a full stop, and what it holds.\n{keys}"
    )
    answer = "\n".join(f"{number}. {value}" for number, (_, value) in enumerate(asked, start=1))
    references = tuple(value for _, value in asked)
    return Turn(question, "", references, answer_tokens(answer, count_tokens), answer)
