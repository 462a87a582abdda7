"""Needles in a haystack, eight variants with the structure of RULER's (arXiv 2404.06654).

A needle states a value of a key. Some keys are asked, the answer is all their values. Three
haystacks: one text repeated, varied English sentences, or nothing but other needles.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sfi_agent.evaluation.tasks import filler, words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["NEEDLE_TASKS", "Needles"]

_NEW_TOKENS = 128
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percentages of the haystack behind which a needle may stand: 40 evenly spaced ones."""
_DRAW: Mapping[str, Callable[[random.Random], str]] = {
    "words": words.two_words,
    "numbers": words.seven_digits,
    "uuids": words.uuid_text,
}


@dataclass(frozen=True, slots=True)
class Needles:
    """One variant.

    Attributes:
        name, summary: See `Task`.
        haystack: "repeat" (one text again and again, a line each), "essay" (varied sentences) or
            "needle" (other needles).
        key_kind, value_kind: "words", "numbers" or "uuids".
        keys: Keys with needles of their own, the asked ones among them.
        values: Values of each key, a needle for each.
        queries: Keys asked.
    """

    name: str
    summary: str
    haystack: Literal["repeat", "essay", "needle"]
    key_kind: Literal["words", "uuids"] = "words"
    value_kind: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`; every seed draws needles and haystack anew."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        drawn_keys = words.Draws(words.distinct(_DRAW[self.key_kind], rng))
        value_rng = random.Random(f"{self.name}:{seed}:values")
        drawn_values = words.Draws(words.distinct(_DRAW[self.value_kind], value_rng))
        number = max(self.keys, self.queries)
        keys, values = drawn_keys.first(number), drawn_values.first(number * self.values)
        needles = [
            (key, values[index * self.values + turn])
            for index, key in enumerate(keys)
            for turn in range(self.values)
        ]
        asked = random.Random(f"{self.name}:{seed}:asked").sample(keys, self.queries)
        expected = tuple(value for wanted in asked for key, value in needles if key == wanted)
        turn = self._turn(asked, expected, count_tokens)
        essay = words.Draws(filler.sentences(random.Random(f"{self.name}:{seed}:essay")))

        def build(units: int) -> Case:
            place = random.Random(f"{self.name}:{seed}:places")
            told = [self._needle(key, value) for key, value in needles]
            place.shuffle(told)
            if self.haystack == "needle":
                others = zip(
                    drawn_keys.first(number + units)[number:],
                    drawn_values.first(len(values) + units)[len(values) :],
                    strict=True,
                )
                hay = [self._needle(key, value) for key, value in others]
            else:
                hay = [filler.REPEATED_BLOCK] * units
                hay = essay.first(units) if self.haystack == "essay" else hay
            spread = _at_depths if self.haystack == "essay" else _at_lines
            joint = " " if self.haystack == "essay" else "\n"
            text = f"{self._opening()}\n\n{joint.join(spread(place, hay, told))}"
            return Case(self.name, seed, "", text, (turn,))

        smallest = max(number * self.values, 2)
        return fit_case(
            build, context_tokens=context_tokens, count_tokens=count_tokens, smallest=smallest
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Values that occur in the output, ignoring case."""
        return contained(turn.references, output, ignore_case=True)

    def score(self, turn: Turn, output: str) -> Score:
        """Share of the values that occur in the output."""
        return score_of(self.part_results(turn, output))

    @property
    def _noun(self) -> str:
        return {"numbers": "number", "uuids": "identifier"}[self.value_kind]

    def _needle(self, key: str, value: str) -> str:
        return f"Remember that the secret {self._noun} of {key} is {value}."

    def _opening(self) -> str:
        some = f"A secret {self._noun} is" if self._single else f"Secret {self._noun}s are"
        return f"{some} stated somewhere in the following text. A question about it comes later."

    @property
    def _single(self) -> bool:
        return self.queries * self.values == 1

    def _turn(
        self, asked: list[str], expected: tuple[str, ...], count_tokens: TokenCounter
    ) -> Turn:
        names = _enumerate(asked)
        if self._single:
            question = f"Which secret {self._noun} of {names} does the text state?"
            prefix = f"The secret {self._noun} of {names} in the text is"
        else:
            question = f"Which secret {self._noun}s of {names} does the text state? Name them all."
            prefix = f"The secret {self._noun}s of {names} in the text are"
        answer = _enumerate(list(expected))
        limit = answer_tokens(answer, count_tokens, _NEW_TOKENS)
        return Turn(question, prefix, expected, limit, f"{answer}.")


def _enumerate(items: list[str]) -> str:
    """ "a", "a and b", "a, b, and c"."""
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"


def _at_depths(rng: random.Random, hay: list[str], needles: list[str]) -> list[str]:
    """Needles behind distinct depths in percent of the haystack."""
    depths = sorted(rng.sample(_DEPTHS, len(needles)))
    text, start = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        stop = len(hay) * depth // 100
        text += [*hay[start:stop], needle]
        start = stop
    return text + hay[start:]


def _at_lines(rng: random.Random, hay: list[str], needles: list[str]) -> list[str]:
    """Needles in front of distinct random lines of the haystack."""
    text = list(hay)
    for index, needle in sorted(
        zip(rng.sample(range(len(hay)), len(needles)), needles, strict=True), reverse=True
    ):
        text.insert(index, needle)
    return text


_essay_task = partial(Needles, haystack="essay")

NEEDLE_TASKS: tuple[Needles, ...] = (
    Needles("niah_single_1", "Find one number in a text that repeats itself.", "repeat"),
    _essay_task("niah_single_2", "Find one number in varied English sentences."),
    _essay_task("niah_single_3", "Find one UUID in varied English sentences.", value_kind="uuids"),
    _essay_task("niah_multikey_1", "Find the number of one key among four keys.", keys=4),
    Needles(
        "niah_multikey_2", "Find the number of one key in a text of other keys' needles.", "needle"
    ),
    Needles(
        "niah_multikey_3",
        "Find the UUID of one UUID in a text of other UUIDs' needles.",
        "needle",
        key_kind="uuids",
        value_kind="uuids",
    ),
    _essay_task("niah_multivalue", "Find all four numbers of one key.", values=4),
    _essay_task("niah_multiquery", "Find the numbers of four keys at once.", queries=4),
)
