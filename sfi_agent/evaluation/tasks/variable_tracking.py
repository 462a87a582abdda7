"""Variable tracking: which names hold a value that was passed on from name to name.

`VariableTracking` has the structure of RULER's task (arXiv 2404.06654): one chain, four hops, in
the noise of one repeated text, behind a solved example. `HardVariableTracking` is the Sparse
Frontier's variant (arXiv 2504.17768): eight chains whose statements are shuffled, scored by
intersection over union.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import filler, words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, overlap_score, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = [
    "Chain",
    "HardVariableTracking",
    "VariableTracking",
    "draw_chains",
    "merged",
    "tracking_turn",
]

HOPS = 4
NAME_LETTERS = 5
_NEW_TOKENS = 30
_OPENING = "The text below sets variables, some by a number and some by another variable."


@dataclass(frozen=True, slots=True)
class Chain:
    """A value and the names that hold it, in the order in which they got it."""

    value: str
    names: tuple[str, ...]

    @property
    def statements(self) -> tuple[str, ...]:
        """The first name gets the number, every other one its predecessor."""
        sources = (self.value, *(f"VAR {name}" for name in self.names[:-1]))
        pairs = zip(self.names, sources, strict=True)
        return tuple(f"VAR {name} = {source}" for name, source in pairs)


def draw_chains(
    rng: random.Random, count: int, hops: int = HOPS, name_letters: int = NAME_LETTERS
) -> list[Chain]:
    """Chains with distinct values and distinct names."""
    names: Iterator[str] = words.distinct(
        lambda source: words.letters(source, name_letters, string.ascii_uppercase), rng
    )
    values = rng.sample(range(10_000, 99_999), count)
    return [Chain(str(value), tuple(next(names) for _ in range(hops + 1))) for value in values]


def tracking_turn(chain: Chain, count_tokens: TokenCounter) -> Turn:
    """Ask for the names that hold the value of a chain."""
    number, answer = len(chain.names), " ".join(chain.names)
    question = f"Which variables hold the value {chain.value} in the end? There are {number}."
    prefix = f"The {number} variables that hold the value {chain.value} are"
    limit = answer_tokens(answer, count_tokens, _NEW_TOKENS)
    return Turn(question, prefix, chain.names, limit, answer)


@dataclass(frozen=True, slots=True)
class VariableTracking:
    """One chain in the noise of a repeated text, with a solved example in front."""

    name: str = "variable_tracking"
    summary: str = "Name the five variables that got a value by a chain of assignments."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        example = _solved_example(rng, count_tokens)
        (chain,) = draw_chains(rng, 1)
        turn = tracking_turn(chain, count_tokens)

        def build(units: int) -> Case:
            place = random.Random(f"{self.name}:{seed}:places")
            text = f"{example}\n\n{_OPENING}\n{_in_noise(place, units, chain.statements)}"
            return Case(self.name, seed, "", text, (turn,))

        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=HOPS + 1
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Names that occur in the output, ignoring case."""
        return contained(turn.references, output, ignore_case=True)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the names that occur in the output."""
        return score_of(self.part_results(turn, output))


@dataclass(frozen=True, slots=True)
class HardVariableTracking:
    """Eight chains, all statements shuffled, in varied English sentences."""

    name: str = "variable_tracking_hard"
    summary: str = "Name the variables of one of eight chains whose assignments are shuffled."
    chains: int = 8

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        chains = draw_chains(rng, self.chains)
        statements = [statement for chain in chains for statement in chain.statements]
        rng.shuffle(statements)
        turn = tracking_turn(chains[0], count_tokens)
        essay = words.Draws(filler.sentences(random.Random(f"{self.name}:{seed}:essay")))

        def build(units: int) -> Case:
            place = random.Random(f"{self.name}:{seed}:places")
            text = "\n".join(merged(place, essay.first(units), statements))
            return Case(self.name, seed, "", f"{_OPENING}\n{text}", (turn,))

        return fit_case(build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=0)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Names that the output has as words of their own."""
        said = _names(output)
        return tuple(name in said for name in turn.references)

    def score(self, turn: Turn, output: str) -> Score:
        """Intersection over union of the names asked for and the names said."""
        return overlap_score(turn.references, _names(output))


def _names(output: str) -> set[str]:
    return set(re.findall(rf"\b[A-Z]{{{NAME_LETTERS}}}\b", output))


def _in_noise(rng: random.Random, units: int, statements: Sequence[str]) -> str:
    """Statements in their order among copies of the noise."""
    return " ".join(merged(rng, [f"{filler.REPEATED_BLOCK}\n"] * units, statements))


def merged(rng: random.Random, hay: Sequence[str], needles: Sequence[str]) -> Iterator[str]:
    """Needles, in their order, at random places between the pieces of hay."""
    total = len(hay) + len(needles)
    places = set(rng.sample(range(total), len(needles)))
    rest, told = iter(hay), iter(needles)
    for place in range(total):
        yield next(told) if place in places else next(rest)


def _solved_example(rng: random.Random, count_tokens: TokenCounter) -> str:
    """A short task of the same kind with its answer, with names of three letters."""
    (chain,) = draw_chains(rng, 1, name_letters=3)
    turn = tracking_turn(chain, count_tokens)
    text = _in_noise(rng, HOPS + 1, chain.statements)
    answer = f"{turn.answer_prefix} {turn.reference_answer}"
    return f"{_OPENING}\n{text}\n\n{turn.question}\n{answer}."
