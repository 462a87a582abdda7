"""Verbatim copying inside a sentence: identifiers, JSON arguments, lines of code.

What agents do all day. Every part of the answer lies in one place of the context and must come
out character for character; copying moves through it token by token.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.mt_kv import spread_positions
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["COPY_TASKS", "Copying", "Material"]

_ASKED = 3


@dataclass(frozen=True, slots=True)
class Material:
    """One kind of text to copy.

    Attributes:
        draw: Draws one text.
        line: How the context states it; has the places {label} and {text}.
        asked: What it is called in the question, in the plural.
        quoted: How the answer states it; has the same places.
        separator: Between the statements of the context.
    """

    draw: Callable[[random.Random], str]
    line: str
    asked: str
    quoted: str
    separator: str = "\n"


@dataclass(frozen=True, slots=True)
class Copying:
    """Labelled texts; three of them are asked for and come back in a sentence each."""

    name: str
    summary: str
    material: Material

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        labels = words.Draws(words.distinct(words.two_words, rng))
        texts = words.Draws(
            words.distinct(self.material.draw, random.Random(f"{self.name}:{seed}:texts"))
        )

        def build(units: int) -> Case:
            items = list(zip(labels.first(units), texts.first(units), strict=True))
            lines = [self.material.line.format(label=label, text=text) for label, text in items]
            place = random.Random(f"{self.name}:{seed}:positions")
            asked = [items[index] for index in spread_positions(place, _ASKED, units)]
            context = self.material.separator.join(lines)
            return Case(self.name, seed, "", context, (self._turn(asked, count_tokens),))

        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=_ASKED
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Texts that occur in the output, character for character."""
        return contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the texts that occur in the output, character for character."""
        return score_of(self.part_results(turn, output))

    def _turn(self, asked: list[tuple[str, str]], count_tokens: TokenCounter) -> Turn:
        first, second, third = (label for label, _ in asked)
        pattern = self.material.quoted.format(label="NAME", text="TEXT")
        question = (
            f"Quote the {self.material.asked} of {first}, {second} and {third}, each in a sentence "
            f"of the form: {pattern} Copy every character."
        )
        answer = " ".join(
            self.material.quoted.format(label=label, text=text) for label, text in asked
        )
        references = tuple(text for _, text in asked)
        return Turn(question, "", references, answer_tokens(answer, count_tokens), answer)


def _identifier(rng: random.Random) -> str:
    parts = [rng.choice(_VERBS), rng.choice(words.ADJECTIVES), rng.choice(words.NOUNS)]
    parts.append(words.letters(rng, 4, string.hexdigits[:16]))
    return "_".join(parts)


def _arguments(rng: random.Random) -> str:
    folder, stem = rng.choice(words.NOUNS), rng.choice(words.NOUNS)
    arguments = {
        "path": f"{folder}/{stem}_{rng.randint(10, 99)}.{rng.choice(('csv', 'json', 'txt'))}",
        "limit": rng.randint(1, 5000),
        "flags": rng.sample(_FLAGS, 2),
        "owner": words.pseudo_word(rng),
        "dry_run": rng.random() < 0.5,
    }
    names = rng.sample(sorted(arguments), len(arguments))
    return json.dumps({name: arguments[name] for name in names})


def _code(rng: random.Random) -> str:
    target, source, key = (rng.choice(words.NOUNS) for _ in range(3))
    call = f"{rng.choice(_VERBS)}_{rng.choice(words.NOUNS)}"
    patterns = (
        f"{target} = {call}({source}[{rng.randint(0, 99)}:], {key}={rng.randint(100, 999)})",
        f"{target}.{key} += {call}({source}) * {rng.randint(2, 99)} - {rng.randint(100, 999)}",
        f'return {{"{target}": {call}({source}["{key}"]), "step": {rng.randint(100, 999)}}}',
        f"if {source}.{key} > {rng.randint(100, 999)}: {target} = {call}({source}, -1)",
    )
    return rng.choice(patterns)


_VERBS = ("load", "merge", "parse", "flush", "index", "trim", "route", "sign", "encode", "probe")
_FLAGS = ("force", "quiet", "follow", "sorted", "strict", "recursive", "append", "verify")
_CODE_LINE = "# {label}\n    {text}"

COPY_TASKS: tuple[Copying, ...] = (
    Copying(
        "copy_identifiers",
        "Copy three long identifiers out of a catalogue, each inside a sentence.",
        Material(
            _identifier,
            "The service {label} calls the function {text} when it starts.",
            "functions",
            "At its start {label} calls {text} and waits.",
        ),
    ),
    Copying(
        "copy_json",
        "Copy the JSON arguments of three calls, each inside a sentence.",
        Material(
            _arguments,
            "The job {label} was called with {text}.",
            "arguments",
            "The job {label} ran with {text} and came to an end.",
        ),
    ),
    Copying(
        "copy_code",
        "Copy three lines of code, each inside a sentence.",
        Material(
            _code,
            _CODE_LINE,
            "lines of code",
            "Under {label} the code says `{text}` and goes on.",
            separator="\n\n",
        ),
    ),
)
