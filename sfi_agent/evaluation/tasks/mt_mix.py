"""Turns of two tasks in alternation over one context that holds both, the idea of SCBench's
multi-tasking sessions (arXiv 2412.10319)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import check_arguments, fit_case
from sfi_agent.evaluation.tasks.mt_kv import lookup_turn, spread_positions
from sfi_agent.evaluation.tasks.mt_prefix_suffix import (
    coded_strings,
    describe_strings,
    prefix_suffix_turn,
)
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["MultiTurnMix"]


@dataclass(frozen=True, slots=True)
class MultiTurnMix:
    """Look-ups in a JSON object, and strings by their ends, in turn."""

    name: str = "mt_mix"
    summary: str = "Alternate between look-ups in a JSON object and strings by their ends."
    turns: int = 6

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. One unit is one pair of the object and one string."""
        check_arguments(context_tokens, seed)
        drawn = words.Draws(
            words.distinct(words.uuid_text, random.Random(f"{self.name}:{seed}:pairs"))
        )
        strings = words.Draws(coded_strings(random.Random(f"{self.name}:{seed}:strings")))

        def build(units: int) -> Case:
            texts, lines = drawn.first(2 * units), strings.first(units)
            pairs = dict(zip(texts[::2], texts[1::2], strict=True))
            keys = list(pairs)
            place = random.Random(f"{self.name}:{seed}:positions")
            turns = []
            for number, index in enumerate(spread_positions(place, self.turns, units)):
                if number % 2:
                    turns.append(prefix_suffix_turn(lines[index], count_tokens))
                else:
                    key = keys[index]
                    turns.append(lookup_turn(key, pairs[key], count_tokens))
            listed = json.dumps(pairs, indent=0)
            context = f"This JSON object maps keys to values.\n\n{listed}\n\n"
            return Case(self.name, seed, "", context + describe_strings(lines), tuple(turns))

        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=self.turns
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Whether the value or the string occurs in the output."""
        return contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """1 where the value or the string occurs in the output, else 0."""
        return score_of(self.part_results(turn, output))
