"""Making a case as long as it may be: the largest number of units whose tokens fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.tasks.task import Case, TokenCounter

__all__ = ["answer_tokens", "case_tokens", "check_arguments", "fit_case"]

_GUESSES = 8
_NEIGHBOURS = 16


def case_tokens(case: Case, count_tokens: TokenCounter) -> int:
    """Tokens of context, questions, tool results and answers together, answers at their limits.

    What a chat template writes around messages, and tool definitions, are not counted: tasks do
    not know them.
    """
    total = count_tokens(case.system) if case.system else 0
    total += count_tokens(case.opening)
    for number, turn in enumerate(case.turns):
        texts = [turn.answer_prefix, *(exchange.result for exchange in turn.exchanges)]
        if number:
            texts.append(turn.question)
        total += sum(count_tokens(text) for text in texts if text) + turn.max_new_tokens
    return total


def answer_tokens(answer: str, count_tokens: TokenCounter, at_least: int = 0) -> int:
    """A limit for an answer: its own tokens and a fifth, or `at_least` where that is more.

    A published limit stays where the tokenizer can say the answer within it.
    """
    own = count_tokens(answer)
    return max(at_least, own + max(8, own // 5))


def check_arguments(context_tokens: int, seed: int) -> None:
    """Refuse lengths and seeds that no case can have.

    Raises:
        InputError: A length below 1, a seed below 0, or no integers.
    """
    for name, value, least in (("context_tokens", context_tokens, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(
                explain("made a case", got=f"{name}={value!r}", allowed=f"integers from {least}")
            )


def fit_case(
    build: Callable[[int], Case],
    *,
    context_tokens: int,
    count_tokens: TokenCounter,
    smallest: int = 1,
    largest: int | None = None,
    even: bool = True,
) -> Case:
    """The case with most units that takes at most `context_tokens` tokens.

    Args:
        build: Makes the case of a number of units; more units, more tokens.
        context_tokens: See `Task.make_case`.
        count_tokens: See `Task.make_case`.
        smallest: Fewest units that make a case.
        largest: Most units that can be made; None where there is no limit.
        even: Whether one unit more always means more tokens. Otherwise neighbours of the found
            number are tried too, as one of them may fill the length better.

    Raises:
        InputError: The smallest case does not fit, or the largest does not fill the length.
    """
    search = _Search(build, context_tokens, count_tokens)
    low = search.trial(smallest)
    if low.tokens > context_tokens:
        allowed = f"{low.tokens} or more with this tokenizer and seed"
        raise search.error(allowed)
    high: _Trial | None = None
    step, per_unit = max(8, smallest), 0.0
    while high is None:
        if low.units == largest:
            if low.tokens + per_unit > context_tokens:
                return search.best
            raise search.error(f"up to {low.tokens} with this tokenizer: there are no more units")
        units = low.units + step
        trial = search.trial(units if largest is None else min(units, largest))
        if trial.tokens > context_tokens:
            high = trial
        else:
            low = trial
        per_unit = (trial.tokens - search.first.tokens) / (trial.units - smallest)
        # A little too far: the search goes on between two ends that lie close together.
        step = max(1, int(1.01 * (context_tokens - low.tokens) / max(1e-3, per_unit)) + 1)
    low = search.between(low, high)
    if not even:
        search.neighbours(low.units, _NEIGHBOURS if largest is None else largest - low.units)
    return search.best


@dataclass(frozen=True, slots=True)
class _Trial:
    units: int
    tokens: int


class _Search:
    """Tries numbers of units and keeps the longest case that fits."""

    def __init__(
        self, build: Callable[[int], Case], limit_tokens: int, count_tokens: TokenCounter
    ) -> None:
        self._build = build
        self._limit = limit_tokens
        self._count = count_tokens
        self._trials: list[_Trial] = []
        self._best: tuple[int, Case] | None = None
        self._task = ""

    @property
    def first(self) -> _Trial:
        return self._trials[0]

    @property
    def best(self) -> Case:
        assert self._best is not None
        return self._best[1]

    def trial(self, units: int) -> _Trial:
        case = self._build(units)
        trial = _Trial(units, case_tokens(case, self._count))
        self._task = case.task
        self._trials.append(trial)
        if trial.tokens <= self._limit and (self._best is None or trial.tokens > self._best[0]):
            self._best = trial.tokens, case
        return trial

    def between(self, low: _Trial, high: _Trial) -> _Trial:
        """The last number of units that fits, between one that does and one that does not."""
        for guesses in count():
            distance = high.units - low.units
            if distance == 1:
                return low
            share = (self._limit - low.tokens) / (high.tokens - low.tokens)
            # Halving is sure to come to an end; guessing is faster where units are alike.
            ahead = distance // 2 if guesses > _GUESSES else round(share * distance)
            trial = self.trial(low.units + min(max(ahead, 1), distance - 1))
            low, high = (trial, high) if trial.tokens <= self._limit else (low, trial)
        raise AssertionError("endless")

    def neighbours(self, units: int, more: int) -> None:
        """Try what lies just above, until the length is filled to a hundredth."""
        for step in range(1, min(_NEIGHBOURS, more) + 1):
            assert self._best is not None
            if self._best[0] >= 0.99 * self._limit:
                return
            self.trial(units + step)

    def error(self, allowed: str) -> InputError:
        return InputError(
            explain(
                f"made a case of {self._task}",
                got=f"context_tokens={self._limit}",
                allowed=allowed,
            )
        )
