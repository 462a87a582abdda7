"""The same conversations again and again: nothing is held but what the ids of the moment need."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_guarantees.adversaries import adversaries
from tests.test_soak import branches, raw
from tests.test_soak.conversing import Conversing
from tests.test_soak.leftovers import Leftovers, resident_bytes
from tests.test_soak.plants import PLANTS, Plant, Setting, plant
from tests.test_soak.policies import make_policy
from tests.test_soak.saves import Places
from tests.test_soak.talk import Disturbance
from tests.test_soak.tools import Stage, make_tools
from tests.test_soak.voice import Voice
from tests.test_soak.watched import Watched

WARM_UP_ROUNDS = 2
TURNS_PER_ROUND = 9
SHORT_ROUNDS = 2
LONG_TURNS = 200
LONG_OPERATIONS = 1000
GROWTH_BLOCKS_PER_ROUND = 300
"""Objects of Python. A round makes and drops a million; the library that maps files of tensors
keeps a few small ones for each of them."""
FIRST_GROWTH_BLOCKS = 1500
GROWTH_BYTES = 48 * 2**20


@pytest.fixture(autouse=True, scope="module")
def _named_adversaries() -> Iterator[None]:
    with adversaries():
        yield


class Company:
    """One session that lasts, and others that come and go beside it."""

    def __init__(self, grown: Plant, policy: str, folder: Path) -> None:
        self.plant = grown
        self.voice = Voice(grown.engine.model)
        self.stage = Stage(self.voice, grown.encode(f"Beside.{grown.end}"))
        self.conversing = Conversing(self.stage)
        self.places = Places(folder)
        self.tools = make_tools(self.stage)
        self.session = branches.open_watched(grown, make_policy(policy), self.tools)
        self.conversing.talk("send", self.session, "Ada?", [], "fine")

    def one_round(self) -> None:
        """Turns, failures, forks, saves and rewinds, and back to where it began."""
        session, conversing = self.session, self.conversing
        start = branches.set_mark(session, 100)
        conversing.talk("run", session, "Ada?", [["note", "raises"], ["forks"]], "sentences")
        self._beside(branches.fork(session, make_policy("dense"), 1))
        conversing.talk("astream", session, " ", [["waits", "broken"]], "thoughts")
        for disturbance in (Disturbance("cancel_step", 3), Disturbance("fail_pass", 4)):
            conversing.talk("stream", session, "Bo?", [], "letters", disturbance=disturbance)
        conversing.talk("run", session, "é 👋", [["cancels"]], "fine")
        self.places.save(session, 0, overwrite=True)
        loaded = self.places.load(self.plant, 0, self.tools, None)
        assert loaded is not None
        self._beside(loaded)
        raw.decode(session, [], 5)
        branches.park(session, None, None)
        branches.rewind(session, start)
        session.marks.clear()
        self.plant.memory.check([session.session])

    def _beside(self, other: Watched) -> None:
        self.conversing.talk("arun", other, "And you?", [["note"]], "fine")
        branches.close(other, [self.session])

    def close(self) -> None:
        branches.close(self.session, [])
        self.voice.close()
        self.plant.engine.close()


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("setting", "policy"),
    list(zip(PLANTS, ("observe", "verify", "rectify"), strict=False)),
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_same_again_holds_no_more(
    setting: Setting, policy: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    is_long = int(pytestconfig.getoption("soak_operations")) >= LONG_OPERATIONS
    rounds = -(-LONG_TURNS // TURNS_PER_ROUND) if is_long else SHORT_ROUNDS
    leftovers = Leftovers()
    company = Company(plant(setting, tmp_path / "parked"), policy, tmp_path)
    blocks, levels = [], []
    for _ in range(WARM_UP_ROUNDS + rounds):
        company.one_round()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
        levels.append(resident_bytes())
    company.close()
    leftovers.require_none()
    allowed = FIRST_GROWTH_BLOCKS + GROWTH_BLOCKS_PER_ROUND * rounds
    assert min(blocks[-2:]) - max(blocks[:WARM_UP_ROUNDS]) <= allowed, blocks
    assert min(levels[-2:]) - max(levels[:WARM_UP_ROUNDS]) <= GROWTH_BYTES, levels
