"""Conversations with watched sessions: what is said, then everything that must be true of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from sfi_agent import ContextOverflowError, InputError
from tests.test_soak.branches import check_tool_fork, rewind, rewind_to
from tests.test_soak.speech import said
from tests.test_soak.talk import CALM, Disturbance, Outcome, Talker, Way
from tests.test_soak.tools import Stage
from tests.test_soak.turn_checks import Talk, check_talk
from tests.test_soak.watched import Watched, open_calls

__all__ = ["Conversing"]


class Conversing:
    """Talks to sessions and checks them.

    Args:
        stage: Of the tools.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._talker = Talker(stage)

    def talk(
        self,
        way: Way,
        watched: Watched,
        question: str,
        calls: Sequence[Sequence[str]],
        answer: str,
        max_turns: int = 4,
        disturbance: Disturbance = CALM,
        refused: str | None = None,
    ) -> None:
        """One message and the turns that follow.

        Where ids without messages are in the way, the session is rewound to before them; where the
        context is full, to its middle.
        """
        if self._refuses(watched, question):
            return
        turns = said(watched.plant, calls if watched.tools else [], answer, refused)
        outcome = self._talker.talk(watched, question, turns, way, max_turns, disturbance, refused)
        limit = 0 if way in ("send", "asend") else max_turns
        check_talk(watched, Talk(question, turns, limit, disturbance.for_way(way)), outcome)
        for made in self._stage.forks:
            check_tool_fork(watched, made)
        self._stage.forks.clear()
        if isinstance(outcome.error, ContextOverflowError):
            rewind_to(watched, watched.tokens // 2)

    def twice(
        self, watched: Watched, question: str, calls: Sequence[Sequence[str]], answer: str
    ) -> None:
        """The same turns twice from the same place come out the same."""
        found: list[Any] = []
        first = watched.set_mark(watched.tokens)
        if first.moment is None or open_calls(first.moment.messages) or watched.lost:
            return
        for _ in range(2):
            self.talk("run", watched, question, calls, answer, 3)
            steps = [(step.kind, step.reason) for step in watched.seen.trace]
            found.append((watched.seen.ids, watched.seen.messages, steps))
            if not first.valid:
                return
            rewind(watched, first)
        for name, one, other in zip(("ids", "messages", "steps"), *found, strict=True):
            assert one == other, f"{name}: {one[-3:]}, and {other[-3:]} the second time"

    def together(self, group: Sequence[Watched], question: str, answer: str) -> None:
        """Turns of many sessions at once, in the same steps."""
        group = [watched for watched in group if not self._refuses(watched, question)]
        spoken = [said(watched.plant, [], answer) for watched in group]
        outcomes = [Outcome() for _ in group]

        async def one(watched: Watched, outcome: Outcome) -> None:
            try:
                outcome.total = await watched.session.arun(question)
            except ContextOverflowError as error:
                outcome.error = error.with_traceback(None)

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, group, outcomes))

        with ExitStack() as stack:
            for watched, turns in zip(group, spoken, strict=True):
                ids = [turn.ids for turn in turns]
                stack.enter_context(self._stage.voice.says(watched.session, ids))
            self._stage.ran.clear()
            asyncio.run(all_of_them())
        for watched, turns, outcome in zip(group, spoken, outcomes, strict=True):
            check_talk(watched, Talk(question, turns, 8, CALM), outcome)
            if outcome.error is not None:
                rewind_to(watched, watched.tokens // 2)

    def tell_all(self, watched: Watched, messages: list[dict[str, Any]]) -> None:
        """Begin with a conversation that took place elsewhere."""
        past = [message for message in messages if message["role"] != "system"]
        past += [_unanswered(call) for call in open_calls(past)]
        given = [*past, {"role": "user", "content": "And now?"}]
        turns = said(watched.plant, [], "fine")
        outcome = self._talker.talk(watched, given, turns, "send")
        if outcome.error is not None:
            assert isinstance(outcome.error, ContextOverflowError)
            watched.check_untouched()
            return
        assert outcome.total is not None and outcome.total.usage.cached_tokens == 0
        told = watched.session.messages
        assert told[-len(given) - 1 : -1] == given and told[-1]["role"] == "assistant"
        watched.odd_from = 0
        watched.settle()

    @staticmethod
    def _refuses(watched: Watched, question: str) -> bool:
        """Whether ids without messages were in the way; they are gone then."""
        if not watched.holds_raw_ids:
            return False
        with pytest.raises(InputError, match="ids without messages"):
            watched.session.send(question)
        watched.check_untouched()
        rewind_to(watched, min(watched.tokens, watched.raw_from or 0))
        return True


def _unanswered(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"], "content": "nobody ran it"}
