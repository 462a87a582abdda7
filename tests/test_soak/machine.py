"""The state machine: operations on a handful of sessions, drawn by hypothesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
)

from sfi_agent import Tool
from tests.test_soak import branches, continuations, raw
from tests.test_soak.conversing import Conversing
from tests.test_soak.plants import PLANTS, Setting, plant
from tests.test_soak.policies import POLICY_NAMES, make_policy
from tests.test_soak.reduction import Recorder, recorded
from tests.test_soak.saves import Places
from tests.test_soak.speech import ANSWERS, CALLS, QUESTIONS
from tests.test_soak.talk import WAYS, Disturbance, Way
from tests.test_soak.tools import Stage, make_tools
from tests.test_soak.voice import Voice
from tests.test_soak.watched import Watched

__all__ = ["SessionsMachine", "machine_of"]

MOST_SESSIONS = 5

policies = st.sampled_from(POLICY_NAMES)
kinds = st.sampled_from(("tools", "plain", "raw", "shortens"))
ways = st.sampled_from(WAYS)
questions = st.sampled_from(QUESTIONS)
answers = st.sampled_from(tuple(ANSWERS))
rounds = st.lists(st.lists(st.sampled_from(tuple(CALLS)), min_size=1, max_size=2), max_size=2)
few = st.integers(0, 12)
places = st.integers(0, 2)
disturbances = st.builds(
    Disturbance,
    st.sampled_from(("cancel_step", "cancel_pass", "cancel_task", "fail_pass", "leave", "intrude")),
    # Early ones fall into prefills.
    st.sampled_from((1, 2, 3, 4, 6, 9, 14, 22)),
)


class SessionsMachine(RuleBasedStateMachine):
    """Every rule is one operation, and every operation is followed by all checks.

    Attributes:
        setting: The model; subclasses have their own.
        runs: What every machine of the class did, in order.
        last: The machine that was made last.
    """

    setting: ClassVar[Setting] = PLANTS[0]
    runs: ClassVar[list[Counter[str]]] = []
    last: ClassVar[SessionsMachine | None] = None

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory(prefix="soak")
        folder = Path(self.folder.name)
        self.parking_folder = folder / "parked"
        self.plant = plant(self.setting, self.parking_folder)
        self.voice = Voice(self.plant.engine.model)
        self.stage = Stage(self.voice, self.plant.encode(f"Beside.{self.plant.end}"))
        self.conversing = Conversing(self.stage)
        self.places = Places(folder)
        self.live: list[Watched] = []
        self.done: Counter[str] = Counter()
        self.recorder = Recorder()
        type(self).last = self
        self.runs.append(self.done)

    def teardown(self) -> None:
        for watched in self.live:
            watched.session.close()
        for made in self.stage.forks:
            made.session.close()
        self.live.clear()
        self.voice.close()
        self.plant.engine.close()
        self.folder.cleanup()

    # ------------------------------------------------------------ sessions come and go

    @initialize(target=sessions, policy=policies, kind=kinds)
    @recorded
    def first(self, policy: str, kind: str) -> Any:
        return self._stays("first", self._opened(policy, kind), True)

    @rule(target=sessions, policy=policies, kind=kinds, stays=st.booleans())
    @recorded
    def open(self, policy: str, kind: str, stays: bool) -> Any:
        return self._stays("open", self._opened(policy, kind), stays)

    @rule(
        target=sessions,
        parent=sessions,
        policy=st.none() | policies,
        seed=st.none() | st.integers(0, 3),
        stays=st.booleans(),
    )
    @recorded
    def fork(self, parent: Watched, policy: str | None, seed: int | None, stays: bool) -> Any:
        config = None if policy is None else make_policy(policy)
        return self._stays("fork", branches.fork(parent, config, seed), stays, parent)

    @precondition(lambda self: len(self.live) > 1)
    @rule(session=consumes(sessions))
    @recorded
    def close(self, session: Watched) -> None:
        self.live.remove(session)
        branches.close(session, self.live)
        self._done("close")

    @rule(target=sessions, session=sessions, policy=policies, stays=st.booleans())
    @recorded
    def elsewhere(self, session: Watched, policy: str, stays: bool) -> Any:
        """The same conversation in a session of its own."""
        kind = "tools" if session.tools else "plain" if session.talks else "raw"
        other = self._opened(policy, kind)
        if session.talks and not session.holds_raw_ids and session.seen.ids:
            self.conversing.tell_all(other, session.seen.messages)
        elif session.seen.ids:
            raw.decode(other, session.seen.ids, 0)
        return self._stays("elsewhere", other, stays, session)

    @rule(session=sessions, place=places, overwrite=st.booleans())
    @recorded
    def save(self, session: Watched, place: int, overwrite: bool) -> None:
        self.places.save(session, place, overwrite=overwrite)
        self._done("save", session)

    @rule(target=sessions, place=places, policy=st.none() | policies, stays=st.booleans())
    @recorded
    def load(self, place: int, policy: str | None, stays: bool) -> Any:
        config = None if policy is None else make_policy(policy)
        watched = self.places.load(self.plant, place, make_tools(self.stage), config)
        if watched is not None:
            return self._stays("load", watched, stays)
        self._done("load_nothing")
        return multiple()

    @rule(target=sessions, session=sessions, place=places, stays=st.booleans())
    @recorded
    def save_and_load(self, session: Watched, place: int, stays: bool) -> Any:
        self.places.save(session, place, overwrite=True)
        watched = self.places.load(self.plant, place, make_tools(self.stage), None)
        assert watched is not None
        return self._stays("save_and_load", watched, stays, session)

    @rule(session=sessions, place=st.sampled_from((None, "host", "disk")))
    @recorded
    def park(self, session: Watched, place: str | None) -> None:
        branches.park(session, place, self.parking_folder if place == "disk" else None)
        self._done("park", session)

    # ------------------------------------------------------------ turns

    @rule(
        session=sessions,
        way=ways,
        question=questions,
        calls=rounds,
        answer=answers,
        max_turns=st.integers(1, 4),
        refused=st.sampled_from((None, None, "look_up")),
    )
    @recorded
    def talk(
        self,
        session: Watched,
        way: Way,
        question: str,
        calls: list[list[str]],
        answer: str,
        max_turns: int,
        refused: str | None,
    ) -> None:
        if session.talks:
            self.conversing.talk(way, session, question, calls, answer, max_turns, refused=refused)
        self._done("talk", session)

    @rule(session=sessions, question=questions, calls=rounds, answer=answers)
    @recorded
    def run(self, session: Watched, question: str, calls: list[list[str]], answer: str) -> None:
        if session.talks:
            self.conversing.talk("run", session, question, calls, answer)
        self._done("run", session)

    @rule(session=sessions, question=questions, calls=rounds, answer=answers)
    @recorded
    def stream(self, session: Watched, question: str, calls: list[list[str]], answer: str) -> None:
        if session.talks:
            self.conversing.talk("stream", session, question, calls, answer)
        self._done("stream", session)

    @rule(
        session=sessions,
        way=ways,
        question=questions,
        calls=rounds,
        answer=answers,
        disturbance=disturbances,
    )
    @recorded
    def disturbed(
        self,
        session: Watched,
        way: Way,
        question: str,
        calls: list[list[str]],
        answer: str,
        disturbance: Disturbance,
    ) -> None:
        if session.talks:
            self.conversing.talk(way, session, question, calls, answer, disturbance=disturbance)
        self._done("disturbed", session)

    @rule(session=sessions, question=questions, calls=rounds, answer=answers)
    @recorded
    def twice(self, session: Watched, question: str, calls: list[list[str]], answer: str) -> None:
        """A turn, taken back, and the same turn again."""
        if session.talks:
            self.conversing.twice(session, question, calls, answer)
        self._done("twice", session)

    @rule(left_out=st.integers(0, MOST_SESSIONS), question=questions, answer=answers)
    @recorded
    def together(self, left_out: int, question: str, answer: str) -> None:
        group = [item for i, item in enumerate(self.live) if item.talks and i != left_out]
        if group:
            self.conversing.together(group, question, answer)
        self._done("together", *group)

    @rule(
        session=sessions,
        count=st.integers(1, 3),
        question=st.sampled_from((None, "Ada?", "Why?")),
    )
    @recorded
    def branch(self, session: Watched, count: int, question: str | None) -> None:
        if session.talks and not session.holds_raw_ids:
            continuations.branch(session, count, question)
        self._done("branch", session)

    # ------------------------------------------------------------ raw ids

    @rule(session=sessions, ids=st.lists(few, max_size=9), count=few)
    @recorded
    def decode(self, session: Watched, ids: list[int], count: int) -> None:
        raw.decode(session, [] if session.talks else ids, count)
        self._done("decode", session)

    @rule(session=sessions, ids=st.lists(few, min_size=1, max_size=9))
    @recorded
    def mix(self, session: Watched, ids: list[int]) -> None:
        """Ids that no message brings, also into a conversation."""
        raw.decode(session, ids, 3)
        self._done("mix", session)

    @rule(session=sessions, ids=st.lists(few, max_size=30), disturbance=disturbances)
    @recorded
    def decode_disturbed(self, session: Watched, ids: list[int], disturbance: Disturbance) -> None:
        raw.decode(session, [] if session.talks else ids, 12, disturbance)
        self._done("decode_disturbed", session)

    @rule(session=sessions, count=st.integers(1, 8))
    @recorded
    def decode_again(self, session: Watched, count: int) -> None:
        raw.decode_again(session, count)
        self._done("decode_again", session)

    @rule(left_out=st.integers(0, MOST_SESSIONS), count=st.integers(0, 8))
    @recorded
    def decode_batch(self, left_out: int, count: int) -> None:
        group = [item for i, item in enumerate(self.live) if item.tokens and i != left_out]
        if group:
            raw.decode_batch(group, count)
        self._done("decode_batch", *group)

    # ------------------------------------------------------------ marks

    @rule(session=sessions, percent=st.sampled_from((100, 0, 50, 90, 97)))
    @recorded
    def mark(self, session: Watched, percent: int) -> None:
        branches.set_mark(session, percent)
        self._done("mark")

    @rule(session=sessions, number=st.integers(0, 7))
    @recorded
    def rewind(self, session: Watched, number: int) -> None:
        if session.marks:
            branches.rewind(session, session.marks[number % len(session.marks)])
        self._done("rewind", session)

    @rule(
        session=sessions,
        percent=st.sampled_from((100, 50, 0, 25, 75, 90)),
        less=st.integers(0, 2),
    )
    @recorded
    def rewind_to(self, session: Watched, percent: int, less: int) -> None:
        branches.rewind_to(session, max(0, session.tokens * percent // 100 - less))
        self._done("rewind_to", session)

    # ------------------------------------------------------------ what all of them do

    def _opened(self, policy: str, kind: str) -> Watched:
        tools: list[Callable[..., Any] | Tool] = []
        if kind in ("tools", "shortens") and self.setting.tools:
            tools = make_tools(self.stage)
        return branches.open_watched(
            self.plant,
            make_policy(policy),
            tools,
            talks=kind != "raw",
            shortens=kind == "shortens",
        )

    def _stays(self, operation: str, new: Watched, stays: bool, *changed: Watched) -> Any:
        """A session that came: it stays if there is room, or it has one turn and goes."""
        if stays and len(self.live) < MOST_SESSIONS:
            self.live.append(new)
            self._done(operation, new, *changed)
            return new
        if new.talks:
            self.conversing.talk("arun", new, "And you?", [["note", "missing"]], "fine")
        else:
            raw.decode(new, [5, 6, 7], 4)
        branches.close(new, self.live)
        self._done(operation, *changed)
        return multiple()

    def _done(self, operation: str, *changed: Watched) -> None:
        """After every operation: other sessions are as they were, and nobody holds too much."""
        self.done[operation] += 1
        for index, watched in enumerate(self.live, self.done.total()):
            # A look brings back what is parked: some of that stays where it is for a while.
            stays_parked = self.setting.parks or watched.session.parked is not None
            if watched not in changed and (not stays_parked or index % 4 == 0):
                watched.check_untouched()
        self.plant.memory.check([watched.session for watched in self.live])


def machine_of(setting: Setting) -> type[SessionsMachine]:
    """A machine class for one model, with a record of its own."""
    return type(f"Sessions_{setting.name}", (SessionsMachine,), {"setting": setting, "runs": []})
