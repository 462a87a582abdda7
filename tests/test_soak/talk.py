"""Turns of a conversation: sent, run or streamed, awaited or not, and disturbed on the way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sfi_agent import ContextOverflowError, Reply, SessionBusy, Step, TextDelta, TurnEnd
from tests.test_soak.speech import Said
from tests.test_soak.tools import Stage
from tests.test_soak.watched import Watched

__all__ = ["CALM", "WAYS", "Disturbance", "Outcome", "StepFailed", "Talker", "Way"]

Way = Literal["send", "run", "stream", "asend", "arun", "astream"]
WAYS: tuple[Way, ...] = ("send", "run", "stream", "asend", "arun", "astream")
Kind = Literal["none", "cancel_step", "cancel_pass", "cancel_task", "fail_pass", "leave", "intrude"]

_PATIENCE_SECONDS = 20.0
_LOOP_TURNS = 12
"""More than a cancelled task needs until whatever it awaits knows."""


class StepFailed(Exception):
    """Raised inside a forward pass by a disturbance."""


@dataclass(frozen=True)
class Disturbance:
    """What happens in the middle of a turn.

    Attributes:
        kind: "cancel_step" behind the n-th token; "cancel_pass", "cancel_task" (that of an
            awaited call) and "fail_pass" in the n-th forward pass; "leave" the stream behind its
            n-th event, or "intrude" there: another call on the session, which is refused.
        number: Counted from 1.
    """

    kind: Kind = "none"
    number: int = 0

    @property
    def harmless(self) -> bool:
        return self.kind in ("none", "intrude")

    def for_way(self, way: Way) -> Disturbance:
        """The same, or what comes nearest to it. The engine's thread runs ahead of whoever reads
        an awaited stream: there only what happens in a pass does not depend on the time."""
        awaited: dict[Kind, Kind] = {"cancel_step": "cancel_pass", "leave": "cancel_task"}
        called: dict[Kind, Kind] = {"cancel_task": "cancel_pass"}
        if way != "stream":
            called |= {"cancel_step": "cancel_pass", "leave": "cancel_pass", "intrude": "none"}
        kinds = {**awaited, "intrude": "none"} if way.startswith("a") else called
        kind: Any = kinds.get(self.kind, self.kind)
        return Disturbance(kind, self.number)


CALM = Disturbance()


@dataclass
class Outcome:
    """What the caller of a turn was told.

    Attributes:
        ends: Replies of turns, each with the ids at its end. `run` tells of none.
        closing: The empty reply behind them, where the loop was cancelled between two turns.
        total: What `send` or `run` returned.
        error: What was raised.
        texts: Of each turn, the text deltas joined.
        runs: How many functions were run.
    """

    ends: list[tuple[Reply, list[int]]] = field(default_factory=list)
    closing: Reply | None = None
    total: Reply | None = None
    error: BaseException | None = None
    texts: list[str] = field(default_factory=lambda: [""])
    runs: int = 0


class Talker:
    """Talks to sessions whose model says what it is told to.

    Args:
        stage: Of the tools.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def talk(
        self,
        watched: Watched,
        message: Any,
        turns: Sequence[Said],
        way: Way,
        max_turns: int = 8,
        disturbance: Disturbance = CALM,
        refused: str | None = None,
    ) -> Outcome:
        """Send a message and let the model's next turns be these; errors are part of the outcome.

        Raises:
            BaseException: Whatever a session must never raise here.
        """
        session, outcome, chosen = watched.session, Outcome(), disturbance.for_way(way)
        self.stage.session = session
        self.stage.ran.clear()
        more: dict[str, Any] = {}
        if way not in ("send", "asend"):
            more["max_turns"] = max_turns
            if refused is not None:
                more["approve"] = lambda call: call.name != refused
        passes = Passes(watched, chosen)
        with self.stage.voice.says(session, [said.ids for said in turns]), passes.disturbed():
            try:
                if way.startswith("a"):
                    call = self._await(watched, way, message, more, outcome, passes)
                    asyncio.run(call)
                elif way == "stream":
                    self._listen(watched, message, more, chosen, outcome)
                else:
                    outcome.total = getattr(session, way)(message, **more)
            except (ContextOverflowError, StepFailed, KeyboardInterrupt) as error:
                outcome.error = error.with_traceback(None)
        if way in ("send", "asend") and outcome.total is not None:
            outcome.ends.append((outcome.total, session.token_ids))
            outcome.texts = [outcome.total.text]
        outcome.runs, self.stage.session = len(self.stage.ran), None
        return outcome

    def _listen(
        self,
        watched: Watched,
        message: Any,
        more: dict[str, Any],
        disturbance: Disturbance,
        outcome: Outcome,
    ) -> None:
        session, steps = watched.session, 0
        stream: Any = session.stream(message, **more)
        for number, event in enumerate(stream, 1):
            note_event(watched, event, outcome)
            if isinstance(event, Step):
                steps += 1
                assert session.token_ids[event.record.position] == event.token_id
                if disturbance == Disturbance("cancel_step", steps):
                    in_another_thread(session.cancel)
                if disturbance == Disturbance("intrude", steps):
                    intrude(watched)
            if disturbance == Disturbance("leave", number):
                stream.close()
                return

    async def _await(
        self,
        watched: Watched,
        way: Way,
        message: Any,
        more: dict[str, Any],
        outcome: Outcome,
        passes: Passes,
    ) -> None:
        call = getattr(watched.session, way)

        async def work() -> None:
            if way != "astream":
                outcome.total = await call(message, **more)
                return
            async for event in call(message, **more):
                note_event(watched, event, outcome)

        task = asyncio.get_running_loop().create_task(work())
        passes.task = task
        try:
            await task
        except asyncio.CancelledError:
            assert passes.disturbance.kind == "cancel_task"


def note_event(watched: Watched, event: Any, outcome: Outcome) -> None:
    """Remember what an event of a stream tells."""
    if isinstance(event, TextDelta):
        outcome.texts[-1] += event.text
    elif isinstance(event, TurnEnd):
        if not event.reply.usage.prompt_tokens:
            outcome.closing = event.reply
            return
        outcome.ends.append((event.reply, watched.session.token_ids))
        outcome.texts.append("")


def intrude(watched: Watched) -> None:
    """Whatever else is asked of a session while it decodes is refused."""
    session = watched.session
    calls: list[Callable[[], Any]] = [
        lambda: session.send("me, too"),
        lambda: session.decode([1], max_new_tokens=1),
        lambda: session.fork(),
        lambda: session.mark(),
        lambda: session.next_logits(),
        lambda: session.save("nowhere"),
        lambda: session.engine.park(session),
    ]
    for call in calls:
        with pytest.raises(SessionBusy):
            call()


def in_another_thread(action: Callable[[], Any]) -> None:
    """Run something in a thread of its own, to its end."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(timeout=_PATIENCE_SECONDS)
    assert not thread.is_alive(), "the thread hangs"


class Passes:
    """Disturbs the n-th forward pass of a turn.

    Args:
        watched: Whose turn it is.
        disturbance: Nothing happens unless it is one of those in a pass.

    Attributes:
        task: The one that awaits the call, if any.
    """

    def __init__(self, watched: Watched, disturbance: Disturbance) -> None:
        self.disturbance = disturbance
        self.task: asyncio.Task[None] | None = None
        self._watched = watched
        self._passes = 0

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        """Within this block."""
        if self.disturbance.kind not in ("cancel_pass", "cancel_task", "fail_pass"):
            yield
            return
        layers = self._watched.plant.engine.model.get_decoder().layers
        # Different layers, so that some have appended the tokens of a failed pass and some not.
        layer = layers[self.disturbance.number % len(layers)]
        handle = layer.register_forward_pre_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, *_: Any) -> None:
        self._passes += 1
        if self._passes != self.disturbance.number:
            return
        if self.disturbance.kind == "fail_pass":
            raise StepFailed
        if self.disturbance.kind == "cancel_pass":
            in_another_thread(self._watched.session.cancel)
            return
        task, heard = self.task, threading.Event()
        assert task is not None
        loop = task.get_loop()

        def cancel() -> None:
            task.cancel()
            turn(_LOOP_TURNS)

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            else:
                heard.set()

        loop.call_soon_threadsafe(cancel)
        assert heard.wait(_PATIENCE_SECONDS), "the loop does not turn"
