"""Look-ups in one JSON object over many turns, in the style of SCBench's Retr.KV.

SCBench is arXiv 2412.10319. Beside plain look-ups there are turns that only a session has: repeat
an answer given earlier (echo), look up what lies far from everything asked so far (cold), state a
new value (update) and ask for it afterwards (updated).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.tasks import words
from sfi_agent.evaluation.tasks.fitting import answer_tokens, check_arguments, fit_case
from sfi_agent.evaluation.tasks.scoring import contained, score_of
from sfi_agent.evaluation.tasks.task import Case, Score, TokenCounter, Turn

__all__ = ["MultiTurnKeyValue", "cold_position", "lookup_turn", "spread_positions"]

TurnKind = Literal["lookup", "echo", "cold", "update", "updated"]


@dataclass(frozen=True, slots=True)
class MultiTurnKeyValue:
    """UUIDs by UUIDs.

    Attributes:
        turn_kinds: What the turns ask. "echo" asks for the answer of the first turn again; "cold"
            for the key in the middle of the longest stretch without a key asked so far; "update"
            states a new value for a key that nobody asked for, and looks up another one;
            "updated" asks for that key, whose later value counts. One update per case.
    """

    name: str = "mt_kv"
    summary: str = "Look up UUIDs over several turns, with repeated, cold and updated keys."
    turn_kinds: tuple[TurnKind, ...] = (
        "lookup",
        "lookup",
        "lookup",
        "echo",
        "cold",
        "update",
        "updated",
    )

    def make_case(self, *, context_tokens: int, seed: int, count_tokens: TokenCounter) -> Case:
        """See `Task.make_case`."""
        check_arguments(context_tokens, seed)
        rng = random.Random(f"{self.name}:{seed}")
        drawn = words.Draws(words.distinct(words.uuid_text, rng))

        def build(units: int) -> Case:
            texts = drawn.first(2 * units + 1)
            pairs = list(zip(texts[1::2], texts[2::2], strict=True))
            turns = _Asker(seed, pairs, texts[0], count_tokens).turns(self.turn_kinds)
            return Case(self.name, seed, "", _as_json(pairs), turns)

        return fit_case(
            build,
            context_tokens=context_tokens,
            count_tokens=count_tokens,
            smallest=2 * len(self.turn_kinds) + 4,
        )

    def part_results(self, turn: Turn, output: str) -> tuple[bool, ...]:
        """Whether the value occurs in the output."""
        return contained(turn.references, output)

    def score(self, turn: Turn, output: str) -> Score:
        """1 where the value occurs in the output, else 0."""
        return score_of(self.part_results(turn, output))


class _Asker:
    """Makes the turns over one list of pairs, and remembers which were asked."""

    def __init__(
        self,
        seed: int,
        pairs: Sequence[tuple[str, str]],
        new_value: str,
        count_tokens: TokenCounter,
    ) -> None:
        self._seed = seed
        self._pairs = pairs
        self._new_value = new_value
        self._count = count_tokens
        self._asked: list[int] = []
        self._changed: int | None = None

    def turns(self, kinds: Sequence[TurnKind]) -> tuple[Turn, ...]:
        lookups = sum(kind in ("lookup", "update") for kind in kinds)
        rng = random.Random(f"mt_kv:{self._seed}:positions")
        places = iter(spread_positions(rng, lookups, len(self._pairs)))
        made: list[Turn] = []
        for kind in kinds:
            if kind == "echo" and made:
                made.append(self._echo(made[0]))
            elif kind == "updated" and self._changed is not None:
                made.append(self._lookup(self._changed))
            elif kind in ("echo", "updated"):
                raise InputError(
                    explain(
                        "made a case of mt_kv",
                        got=f"{kind!r} as turn {len(made) + 1}",
                        allowed='"echo" behind another turn, "updated" behind "update"',
                    )
                )
            elif kind == "cold":
                made.append(self._lookup(cold_position(self._asked, len(self._pairs))))
            elif kind == "update":
                place = next(places)
                made.append(self._lookup(place, note=self._change(place)))
            else:
                made.append(self._lookup(next(places)))
        return tuple(made)

    def _lookup(self, place: int, note: str = "") -> Turn:
        self._asked.append(place)
        key, value = self._pairs[place]
        return lookup_turn(
            key, self._new_value if place == self._changed else value, self._count, note
        )

    def _change(self, asked_next: int) -> str:
        """Give a key that is far from all others a new value; returns what the user says."""
        self._changed = cold_position([*self._asked, asked_next], len(self._pairs))
        key = self._pairs[self._changed][0]
        return f'From now on the value of the key "{key}" is "{self._new_value}". '

    def _echo(self, first: Turn) -> Turn:
        question = (
            "Say once more the value that you gave in your first answer, "
            "without looking it up by its key."
        )
        prefix = "The value of my first answer is"
        return Turn(question, prefix, first.references, first.max_new_tokens, first.answer)


def lookup_turn(key: str, value: str, count_tokens: TokenCounter, note: str = "") -> Turn:
    """Ask for the value of a key of a JSON object."""
    question = f'{note}Which value does the key "{key}" have in the JSON object?'
    limit = answer_tokens(f'"{value}".', count_tokens, 0)
    return Turn(question, f'The value of "{key}" is', (value,), limit, f'"{value}".')


def spread_positions(rng: random.Random, count: int, total: int) -> list[int]:
    """`count` distinct positions out of `total`, one in each of as many equal stretches, in
    random order."""
    places = [
        rng.randrange(index * total // count, (index + 1) * total // count)
        for index in range(count)
    ]
    rng.shuffle(places)
    return places


def cold_position(asked: Sequence[int], total: int) -> int:
    """The middle of the longest stretch without an asked position.

    What a memory has selected so far depends on policy and model; distance to everything asked is
    the same for all, and needs no trace.
    """
    borders = sorted({-1, *asked, total})
    gaps = list(zip(borders[:-1], borders[1:], strict=True))
    start, end = max(gaps, key=lambda gap: gap[1] - gap[0])
    return (start + end) // 2


def _as_json(pairs: Sequence[tuple[str, str]]) -> str:
    return f"This JSON object maps keys to values.\n\n{json.dumps(dict(pairs), indent=0)}"
