"""Answers of thousands of tokens whose right wording is known: records, counting, a machine.

The longer the answer, the more of what is read was written by the policy under test. The parts of
an answer lie in order, so drift shows when they are counted by where they stand (`positions`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import lines_contained
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["LongCounting", "LongRecords", "LongStateMachine"]


@dataclass(frozen=True, slots=True)
class LongRecords:
    """Shuffled records, to be written out in the order of their numbers."""

    name: str = "long_records"
    summary: str = "Write out all records of a shuffled list in the order of their numbers."

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. Half of the tokens are the answer's."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        owners = words.Draws(words.distinct(words.two_words, rng))
        codes = words.Draws(words.distinct(words.seven_digits, rng))

        def build(units: int) -> Case:
            drawn = zip(owners.first(units), codes.first(units), strict=True)
            records = tuple(
                f"Record {number}: {owner} has code {code}."
                for number, (owner, code) in enumerate(drawn, start=1)
            )
            shown = list(records)
            random.Random(f"{self.name}:{seed}:order").shuffle(shown)
            question = (
                f"Write out the {units} records in the order of their numbers, from 1 to {units}, "
                "one per line and word for word."
            )
            turn = _lines_turn(question, records, count_tokens)
            return Case(self.name, seed, "", "\n".join(shown), (turn,))

        return fit_case(build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=2)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Records that are lines of the output."""
        return lines_contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the records that are lines of the output; exact in the right order only."""
        return _line_score(self.part_results(turn, output), turn, output)


@dataclass(frozen=True, slots=True)
class LongCounting:
    """Count on by threes, a number per line. All of the length is the answer's."""

    name: str = "long_counting"
    summary: str = "Count on by threes for as long as the length allows."
    step: int = 3

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        start = random.Random(f"{self.name}:{seed}").randint(100, 999)

        def build(units: int) -> Case:
            numbers = tuple(str(start + self.step * index) for index in range(units))
            context = (
                f"A counter starts at {numbers[0]} and grows by {self.step} with every line. "
                f"It stops behind {numbers[-1]}."
            )
            question = "Write every value of the counter, one per line and nothing else."
            return Case(
                self.name, seed, "", context, (_lines_turn(question, numbers, count_tokens),)
            )

        return fit_case(build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=2)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Numbers that occur in the output."""
        said = set(re.findall(r"\d+", output))
        return tuple(number in said for number in turn.references)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the numbers that occur in the output; exact where it says just these, in
        order."""
        parts = self.part_results(turn, output)
        exact = re.findall(r"\d+", output) == list(turn.references)
        return Score(sum(parts), len(parts), exact)


@dataclass(frozen=True, slots=True)
class LongStateMachine:
    """Trace a machine over rows of a tape. Every row starts in a stated state, so that a slip costs
    the rest of its row and no more.

    Attributes:
        states: Number of states, letters from A on.
        symbols: Number of symbols of the tape, letters from p on.
        row_symbols: Symbols per row.
    """

    name: str = "long_state_machine"
    summary: str = "Trace a state machine over many rows of symbols, writing down every state."
    states: int = 6
    symbols: int = 3
    row_symbols: int = 8

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. One unit is one row."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        names = [chr(ord("A") + index) for index in range(self.states)]
        marks = [chr(ord("p") + index) for index in range(self.symbols)]
        moves = {(state, mark): rng.choice(names) for state in names for mark in marks}

        def build(units: int) -> Case:
            tape_rng = random.Random(f"{self.name}:{seed}:tape")
            rows, answers = [], []
            for number in range(1, units + 1):
                state = tape_rng.choice(names)
                tape = [tape_rng.choice(marks) for _ in range(self.row_symbols)]
                rows.append(f"row {number}: start {state}, read {' '.join(tape)}")
                path = [state]
                for mark in tape:
                    path.append(moves[path[-1], mark])
                answers.append(f"row {number}: {' '.join(path)}")
            table = "\n".join(
                f"In state {state}, reading {mark} leads to state {after}."
                for (state, mark), after in moves.items()
            )
            question = (
                "Trace the machine over every row. Write one line per row: its number as above, "
                "the start state, and the state behind each symbol."
            )
            turn = _lines_turn(question, tuple(answers), count_tokens)
            tape_text = "\n".join(rows)
            return Case(self.name, seed, "", f"{table}\n\n{tape_text}", (turn,))

        return fit_case(build, context_tokens=context_tokens, count_tokens=count_tokens)

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Rows that are lines of the output."""
        return lines_contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the rows that are lines of the output; exact in the right order only."""
        return _line_score(self.part_results(turn, output), turn, output)


def _lines_turn(question: str, lines: tuple[str, ...], count_tokens: TokenCounter) -> Turn:
    answer = "\n".join(lines)
    # A limit of a fifth above thousands of tokens would leave room for another task.
    limit = count_tokens(answer) + 64
    return Turn(question, "", lines, limit, answer)


def _line_score(parts: Sequence[bool], turn: Turn, output: str) -> Score:
    said = [line.strip() for line in output.strip().splitlines()]
    return Score(sum(parts), len(parts), said == list(turn.references))
