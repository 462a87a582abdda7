"""Random conversations: turns, tools, cuts, rewinds and forks, checked after every action."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfi_agent import Engine, Session, Step, TurnEnd
from tests.test_session.conversations import (
    DENSE,
    FULL,
    call_text,
    chat_engine,
    require_whole,
    says,
)

END = "<|im_end|>"
WORDS = ("Ada", "room 12.", "3.14", "e.g. this", "é 👋", "<|im_end|>", "Why?\n\n", "<tool_call>")


def look_up(query: str, times: int = 1) -> str:
    """Looks something up.

    Args:
        query: What to look for.
        times: How often to say it.
    """
    if times < 0:
        raise ValueError("cannot say it less than never")
    return f"found {query} " * times


@dataclass(frozen=True)
class Action:
    """One thing that happens to a session; which fields matter depends on the kind."""

    kind: str
    text: str = ""
    rounds: list[list[tuple[str, int]]] = field(default_factory=list)
    answer: str = "Fine."
    number: int = 1


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
answers = st.lists(st.sampled_from(("Well", "no.", "Room 12!", "é")), min_size=1).map(" ".join)
calls = st.tuples(st.sampled_from(("Ada", "Bo", "3.14")), st.integers(-1, 2))
rounds = st.lists(st.lists(calls, min_size=1, max_size=2), max_size=2)
actions = st.one_of(
    st.builds(Action, st.just("run"), texts, rounds, answers, st.integers(1, 4)),
    st.builds(Action, st.just("send"), texts, rounds, answers),
    st.builds(Action, st.just("cut"), texts, rounds, answers, st.integers(1, 12)),
    st.builds(Action, st.just("rewind"), number=st.integers(0, 5)),
    st.builds(Action, st.just("fork")),
)


def outputs_of(action: Action) -> list[str]:
    """What the model says: a turn for every round of calls, and the answer."""
    with_calls = [
        "Let me see." + "".join(f"\n{call_text('look_up', query=q, times=n)}" for q, n in part)
        for part in action.rounds
    ]
    return [text + END for text in [*with_calls, action.answer]]


class Play:
    """Does actions and checks what must hold after each of them."""

    def __init__(self, engine: Engine, session: Session) -> None:
        self.engine = engine
        self.sessions = [session]
        self.marks = [session.mark()]
        self.all_turns_are_whole = True

    @property
    def session(self) -> Session:
        return self.sessions[-1]

    def do(self, action: Action) -> None:
        before = self.session.token_ids
        getattr(self, action.kind)(action)
        if action.kind != "rewind":
            assert self.session.token_ids[: len(before)] == before
            self.marks.append(self.session.mark())
        require_whole(self.session)
        self.require_answered_calls()
        if self.all_turns_are_whole:
            self.require_template_text()

    def run(self, action: Action) -> None:
        with says(self.engine, *outputs_of(action)):
            reply = self.session.run(action.text, max_turns=action.number)
        needed = len(action.rounds) + 1
        assert reply.finish_reason == ("max_turns" if needed > action.number else "stop")
        assert reply.usage.reuse_lost_reason is None

    def send(self, action: Action) -> None:
        cached = max(0, len(self.session.token_ids) - 1)
        with says(self.engine, outputs_of(action)[0]):
            usage = self.session.send(action.text).usage
        assert usage.cached_tokens == cached
        assert usage.prompt_tokens + usage.output_tokens == len(self.session.token_ids)

    def cut(self, action: Action) -> None:
        """Cancelled after some tokens."""
        steps = 0
        with says(self.engine, *outputs_of(action)):
            for event in self.session.stream(action.text):
                steps += isinstance(event, Step)
                if steps == action.number:
                    self.session.cancel()
                if isinstance(event, TurnEnd):
                    self.all_turns_are_whole &= event.reply.finish_reason != "cancelled"

    def rewind(self, action: Action) -> None:
        mark = self.marks[action.number % len(self.marks)]
        self.session.rewind(mark)
        del self.marks[self.marks.index(mark) + 1 :]
        assert len(self.session.token_ids) == mark.token_count

    def fork(self, action: Action) -> None:
        parent = self.session
        config = FULL if parent.config is DENSE else DENSE
        self.sessions.append(parent.fork(config))
        assert self.session.messages == parent.messages
        self.marks = []

    def require_answered_calls(self) -> None:
        """Every call is answered once, in the messages right behind it, before anybody speaks."""
        waiting: list[str] = []
        for message in self.session.messages:
            if message["role"] == "tool":
                assert waiting.pop(0) == message["tool_call_id"]
                continue
            assert not waiting
            waiting = [call["id"] for call in message.get("tool_calls", ())]

    def require_template_text(self) -> None:
        """The ids are the text that the template makes of the messages."""
        tokenizer: Any = self.engine.tokenizer
        assert self.session._chat is not None
        if self.session.token_ids:
            expected = tokenizer.apply_chat_template(
                self.session.messages, tools=self.session._chat.tools.schemas, tokenize=False
            )
            assert tokenizer.decode(self.session.token_ids) + "\n" == expected


@pytest.mark.parametrize("family", ["qwen2", "olmo3"])
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=st.lists(actions, min_size=3, max_size=6), dense=st.booleans())
def test_random_conversations_equal_a_recompute(
    family: str, script: list[Action], dense: bool
) -> None:
    engine = chat_engine("CHATML", family)
    with engine.session(DENSE if dense else FULL, system="Be kind.", tools=[look_up]) as session:
        play = Play(engine, session)
        for action in script:
            play.do(action)
        for item in play.sessions:
            require_whole(item)
        for child in play.sessions[1:]:
            child.close()
