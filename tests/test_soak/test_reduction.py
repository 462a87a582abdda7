"""A failure is told as the shortest sequence of operations that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.test_guarantees.adversaries import adversaries
from tests.test_soak.machine import SessionsMachine
from tests.test_soak.plants import PLANTS
from tests.test_soak.test_many_sessions import play
from tests.test_soak.watched import Watched

LENGTH = 60


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


class BrokenMachine(SessionsMachine):
    """Finds fault with a session that is rewound after it was a parent."""

    setting = PLANTS[3]
    runs = []

    def __init__(self) -> None:
        super().__init__()
        self.parents: list[Watched] = []

    def _stays(self, operation: str, new: Watched, stays: bool, *changed: Watched) -> Any:
        if operation == "fork":
            self.parents += changed
        return super()._stays(operation, new, stays, *changed)

    def _done(self, operation: str, *changed: Watched) -> None:
        super()._done(operation, *changed)
        if operation == "rewind_to":
            assert not any(watched in self.parents for watched in changed), "planned"


def test_a_failure_is_told_as_the_shortest_sequence() -> None:
    found = ""
    for first_draw in range(20):
        try:
            play(BrokenMachine, first_draw, LENGTH)
        except AssertionError as error:
            found = str(error)
            break
    assert "planned" in found and "3 operations show it" in found, found
    first, fork, rewind = found.splitlines()[-3:]
    parent, _, made = first.partition(" = ")
    assert made.startswith(("open(", "first("))
    assert fork.startswith("fork(") and f"parent={parent}" in fork
    assert rewind.startswith("rewind_to(") and f"session={parent}" in rewind
