"""Variable tracking over several turns: five chains in one context, every turn asks another."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import filler, words
from sfi_agent.evaluation.tasks.fitting import check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn
from sfi_agent.evaluation.tasks.variable_tracking import draw_chains, merged, tracking_turn

__all__ = ["MultiTurnVariableTracking"]


@dataclass(frozen=True, slots=True)
class MultiTurnVariableTracking:
    """Chains whose statements keep their own order and are mixed with those of the others."""

    name: str = "mt_variable_tracking"
    summary: str = "Name the variables of one chain of assignments per turn."
    turns: int = 5

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        chains = draw_chains(rng, self.turns)
        waiting = [list(chain.statements) for chain in chains]
        order = [index for index, chain in enumerate(chains) for _ in chain.statements]
        rng.shuffle(order)
        statements = [waiting[index].pop(0) for index in order]
        turns = tuple(tracking_turn(chain, count_tokens) for chain in chains)
        essay = words.Draws(filler.sentences(random.Random(f"{self.name}:{seed}:essay")))

        def build(units: int) -> Case:
            place = random.Random(f"{self.name}:{seed}:places")
            text = "\n".join(merged(place, essay.first(units), statements))
            opening = "The text below sets variables by numbers and by each other."
            return Case(self.name, seed, "", f"{opening}\n{text}", turns)

        return fit_case(build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=0)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Names that occur in the output, ignoring case."""
        return contained(turn.references, output, ignore_case=True)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the names that occur in the output."""
        return score_of(self.part_results(turn, output))
