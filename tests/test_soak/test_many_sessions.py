"""The soak test: operations drawn from a seed, on a handful of sessions of every kind of model.

After each of them everything about the sessions is compared with plain data and a plain recompute.
When something does not hold, the shortest sequence of operations that shows it is printed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.test_guarantees.adversaries import adversaries
from tests.test_soak.conftest import SUMMARY
from tests.test_soak.leftovers import Leftovers, resident_bytes
from tests.test_soak.machine import SessionsMachine, machine_of
from tests.test_soak.plants import PLANTS, Setting
from tests.test_soak.reduction import shortest, shown

LONGEST_RUN = 200
MOST_RUNS = 1000
GROWTH_BYTES = 96 * 2**20
"""Of the process, over all runs of a model behind the first: what the allocator keeps, and what a
recompute of the longest conversation takes."""


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


@pytest.mark.timeout(0)
@pytest.mark.parametrize("setting", PLANTS, ids=lambda setting: setting.name)
def test_sessions_are_what_their_ids_say(
    setting: Setting,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    wanted = -(-int(pytestconfig.getoption("soak_operations")) // len(PLANTS))
    first = zlib.crc32(setting.name.encode()) + int(pytestconfig.getoption("soak_seed"))
    machine, leftovers = machine_of(setting), Leftovers()
    done: Counter[str] = Counter()
    levels: list[int] = []
    while done.total() < wanted and len(levels) < MOST_RUNS:
        done += play(machine, first + len(levels), min(LONGEST_RUN, wanted))
        leftovers.require_none()
        levels.append(resident_bytes())
    assert done.total() >= wanted
    assert max(levels) - levels[0] <= GROWTH_BYTES, levels
    told = ", ".join(f"{name} {count}" for name, count in done.most_common())
    summary = f"{setting.name}, {done.total()} operations in {len(levels)} runs: {told}"
    record_property(SUMMARY, summary)


def play(machine: type[SessionsMachine], first_draw: int, length: int) -> Counter[str]:
    """One run; what was done in it.

    Raises:
        AssertionError: Something did not hold; with the shortest sequence that shows it.
    """
    before = len(machine.runs)
    chosen = settings(
        # The first one is what the library always begins with: the simplest draws there are.
        max_examples=2,
        stateful_step_count=length,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        # Cutting down what was drawn takes too long here: what was done is cut down, see below.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(first_draw)(machine), settings=chosen)
    except (Exception, pytest.fail.Exception) as error:
        assert machine.last is not None
        steps = shortest(machine, machine.last.recorder.steps)
        told = shown(steps)
        raise AssertionError(f"{error!r}\n\n{len(steps)} operations show it:\n{told}") from error
    finally:
        machine.last = None
    return sum(machine.runs[before + 1 :], Counter())
