"""Tool results that pile up over turns, as in an agent's loop, and questions back to old ones.

Every turn brings a table of JSON rows and a question: about the new table at first, about the very
first one after ten turns, and at the end one that needs rows of two tables.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["ToolLoop"]

_INTRODUCTION = (
    "You are at work with two tools. Each message brings what one of them returned, as JSON rows, "
    "and a question. Some questions are about the rows of earlier messages."
)
_ORDER_FIELDS = ("item", "batch", "crew")
_CUSTOMER_FIELDS = ("street", "phone", "broker")


@dataclass(frozen=True, slots=True)
class _Question:
    row: str
    field: str
    value: str
    through: str = ""


@dataclass(frozen=True, slots=True)
class ToolLoop:
    """Tables of orders and of customers in turn; every order names a customer.

    Attributes:
        recent_turns: Turns that ask about the table they bring; a turn about the first table and
            one about two tables follow.
    """

    name: str = "tool_loop"
    summary: str = "Answer from tool results of this turn, of ten turns ago, and of two at once."
    recent_turns: int = 10

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`. One unit is one row."""
        check_arguments(context_tokens, seed)

        def build(rows: int) -> Case:
            rng = random.Random(f"{self.name}:{seed}")
            tables = _tables(rng, self.recent_turns + 2, rows)
            questions = [_about(rng, tables[number], number) for number in range(self.recent_turns)]
            questions += [_about(rng, tables[0], 0), _join(rng, tables)]
            turns = [
                _turn(number, table, question, count_tokens)
                for number, (table, question) in enumerate(zip(tables, questions, strict=True))
            ]
            return Case(self.name, seed, "", _INTRODUCTION, tuple(turns))

        smallest = self.recent_turns + 2
        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=smallest
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Whether the value occurs in the output."""
        return contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """1 where the value occurs in the output, else 0."""
        return score_of(self.part_results(turn, output))


def _tables(rng: random.Random, count: int, rows: int) -> list[list[dict[str, str]]]:
    """So many rows, spread evenly: orders and customers in turn; orders name customers of the
    table behind theirs."""
    ids = words.distinct(lambda source: words.letters(source, 7, string.digits), rng)
    names = words.distinct(words.pseudo_word, rng)
    sizes = [rows // count + (number < rows % count) for number in range(count)]
    tables: list[list[dict[str, str]]] = []
    customers: list[str] = []
    for number, size in enumerate(sizes):
        if number % 2:
            tables.append([{"id": row, **_values(names, _CUSTOMER_FIELDS)} for row in customers])
            continue
        behind = sizes[number + 1] if number + 1 < count else size
        customers = [f"C{next(ids)}" for _ in range(behind)]
        tables.append(
            [
                {
                    "id": f"O{next(ids)}",
                    **_values(names, _ORDER_FIELDS),
                    "customer": rng.choice(customers),
                }
                for _ in range(size)
            ]
        )
    return tables


def _values(names: Iterator[str], fields: Sequence[str]) -> dict[str, str]:
    return {field: next(names) for field in fields}


def _about(rng: random.Random, table: Sequence[dict[str, str]], number: int) -> _Question:
    row = rng.choice(table)
    field = rng.choice(_CUSTOMER_FIELDS if number % 2 else _ORDER_FIELDS)
    return _Question(row["id"], field, row[field])


def _join(rng: random.Random, tables: Sequence[Sequence[dict[str, str]]]) -> _Question:
    """The customer of an early order: two tables, of which neither came lately."""
    order, field = rng.choice(tables[2]), rng.choice(_CUSTOMER_FIELDS)
    (customer,) = (row for row in tables[3] if row["id"] == order["customer"])
    return _Question(order["id"], field, customer[field], through="customer")


def _turn(
    number: int, table: Sequence[dict[str, str]], asked: _Question, count_tokens: TokenCounter
) -> Turn:
    tool = "list_customers" if number % 2 else "list_orders"
    rows = "\n".join(json.dumps(row) for row in table)
    what = f"{asked.field} of the {asked.through} of {asked.row}" if asked.through else ""
    what = what or f"{asked.field} of {asked.row}"
    question = f"{tool} returned:\n{rows}\n\nWhat is the {what}?"
    answer = f"{asked.value}."
    limit = answer_tokens(answer, count_tokens)
    return Turn(question, f"The {what} is", (asked.value,), limit, answer)
