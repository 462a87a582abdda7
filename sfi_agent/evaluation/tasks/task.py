"""What an evaluation task is: it makes cases from seeds and scores answers.

A case is one context and questions about it, in turns. Tasks know text only: a function counts
tokens for them, so every tokenizer serves, and whoever plays a case decides about templates,
policies and protocols.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Case", "Score", "Task", "TokenCounter", "ToolExchange", "Turn"]

TokenCounter = Callable[[str], int]
"""Number of tokens of a text, without special tokens."""


@dataclass(frozen=True, slots=True)
class ToolExchange:
    """One tool call that a right answer makes, and what the tool gives back.

    Attributes:
        name: The tool's name.
        arguments: The arguments by name, plain JSON data.
        result: The result as text.
    """

    name: str
    arguments: Mapping[str, Any]
    result: str

    @property
    def call_json(self) -> str:
        """The call as JSON: the reference of the turn that makes it."""
        return json.dumps({"name": self.name, "arguments": dict(self.arguments)})


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a case and its answer.

    Attributes:
        question: What the user asks; in the first turn it stands behind the context. "" in a turn
            that begins with tool results.
        answer_prefix: What the answer begins with, given to the model; "" where it begins alone.
            It does not end with white space, and the answer goes on behind a space.
        references: The strings that make up the right answer, in order.
        max_new_tokens: How many tokens an answer may have.
        answer: A right answer, word for word, behind the prefix; "" joins the references by
            commas. It is what reference answers put in the place of the model's.
        exchanges: The calls that the turn before should have made, with their results, where this
            turn begins with tool results and not with a question.
        calls: The calls that a right answer of this turn makes; its references are their JSON.
    """

    question: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    answer: str = ""
    exchanges: tuple[ToolExchange, ...] = ()
    calls: tuple[ToolExchange, ...] = ()

    @property
    def reference_answer(self) -> str:
        """A right answer as text, without the prefix and without a space in front."""
        return self.answer or ", ".join(self.references)


@dataclass(frozen=True, slots=True)
class Case:
    """One context and the questions about it.

    Attributes:
        task: Name of the task that made it.
        seed: What it was made from.
        system: System prompt; "" for none.
        context: The long text, in front of the first question.
        turns: At least one.
        tools: Functions the model may call; most cases have none. They follow from the other
            fields, so equal cases may hold different function objects.
    """

    task: str
    seed: int
    system: str
    context: str
    turns: tuple[Turn, ...]
    tools: tuple[Callable[..., str], ...] = field(default=(), compare=False)

    @property
    def opening(self) -> str:
        """Context and first question as one user message."""
        question = self.turns[0].question
        return (
            f"{self.context}\n\n{question}"
            if self.context and question
            else (self.context or question)
        )


@dataclass(frozen=True, slots=True)
class Score:
    """How an answer compares with its references.

    Attributes:
        right: Parts of the answer that are right; higher is better.
        parts: Parts expected, at least 1.
        exact: Whether the whole answer counts as right.
    """

    right: int
    parts: int
    exact: bool

    @property
    def share(self) -> float:
        """`right / parts`, 0 to 1, higher is better."""
        return self.right / self.parts


class Task(Protocol):
    """A generator of cases and the judge of their answers."""

    @property
    def name(self) -> str:
        """What users write; lower case with underscores."""
        ...

    @property
    def summary(self) -> str:
        """What it measures, as one sentence."""
        ...

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """The case of a seed and length; equal arguments give equal cases on every machine.

        Args:
            context_tokens: Tokens that context, questions and answers may take together; reached
                from below as closely as the task's units allow.
            seed: At least 0.
            count_tokens: How the model's tokenizer counts.

        Raises:
            InputError: `context_tokens` is too small for the task, or an argument is unusable.
        """
        ...

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Which references of the turn an answer (without its prefix) has right, in order."""
        ...

    def score(self, turn: Turn, output: str) -> Score:
        """Judge an answer (without its prefix)."""
        ...
