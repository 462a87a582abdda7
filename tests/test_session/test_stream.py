"""Events of a stream: typed, in order, and agreeing with the reply and the session."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import pytest

from sfi_agent import (
    InputError,
    ReasoningDelta,
    Session,
    SessionConfig,
    Step,
    TextDelta,
    ToolCall,
    ToolResult,
    ToolStart,
    TurnEnd,
)
from sfi_agent.session.events import Event
from tests.test_session.conversations import (
    DENSE,
    FULL,
    SPARSE,
    call_text,
    chat_engine,
    encode,
    require_whole,
    says,
)

END = "<|im_end|>"
EVERY_KIND = (Step, TextDelta, ReasoningDelta, ToolCall, ToolStart, ToolResult, TurnEnd)
THOUGHT = "<think>\nWho is it? Let me see.\n</think>\n\n"


def greet(name: str) -> str:
    """Greets somebody.

    Args:
        name: Whom.
    """
    return f"Hello {name} <|im_end|>"


def joined(events: Sequence[Event], kind: type[TextDelta] | type[ReasoningDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


@pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
def test_events_of_a_turn_add_up_to_its_reply(config: SessionConfig) -> None:
    engine = chat_engine("CHATML_THINKING")
    output = f"{THOUGHT}I greet. Ünï 👋🏽\n\n{call_text('greet', name='Ada')}{END}"
    with engine.session(config, tools=[greet]) as session:
        with says(engine, output, f"Done.{END}"):
            events = list(session.stream("Greet Ada."))
        border = next(i for i, event in enumerate(events) if isinstance(event, TurnEnd))
        turn, rest = events[: border + 1], events[border + 1 :]
        end = turn[-1]
        assert isinstance(end, TurnEnd) and isinstance(events[-1], TurnEnd)
        reply = end.reply
        assert joined(turn, ReasoningDelta) == reply.reasoning == "Who is it? Let me see."
        assert joined(turn, TextDelta) == reply.text == "I greet. Ünï 👋🏽"
        assert tuple(event for event in turn if isinstance(event, ToolCall)) == reply.tool_calls
        steps = [event for event in turn if isinstance(event, Step)]
        assert [step.token_id for step in steps] == encode(engine, output)
        assert tuple(step.record for step in steps) == reply.steps
        assert "".join(step.text for step in steps) == output
        start, result = rest[:2]
        assert isinstance(start, ToolStart) and start.call == reply.tool_calls[0]
        assert isinstance(result, ToolResult)
        assert (result.call_id, result.content) == ("call_0", "Hello Ada <|im_end|>")
        assert sum(isinstance(event, TurnEnd) for event in events) == 2


def test_events_come_as_they_happen() -> None:
    engine = chat_engine()
    with engine.session(FULL, tools=[greet]) as session:
        with says(engine, f"One two. {call_text('greet', name='Ada')}{END}", f"Done.{END}"):
            lengths, kinds = [], []
            for event in session.stream("Greet Ada."):
                kinds.append(type(event).__name__)
                if isinstance(event, Step):
                    lengths.append(len(session.token_ids) - 1 - event.record.position)
        assert set(lengths) == {0}, "a step is told when its token is the session's last"
        call, result = kinds.index("ToolCall"), kinds.index("ToolResult")
        assert kinds.index("TextDelta") < call < kinds.index("TurnEnd")
        assert kinds.index("TurnEnd") < kinds.index("ToolStart") < result
        # The call is known when its tag is closed, one token before the stop token.
        assert kinds[call + 1 :].index("Step") == 0


def test_stream_run_and_send_say_the_same() -> None:
    engine = chat_engine()
    ids = []
    for action in ("send", "run", "stream"):
        with engine.session(SPARSE.replace(sampling={"max_new_tokens": 20})) as session:
            for text in ("Hello.", "Well?"):
                result: Any = getattr(session, action)(text)
                if action == "stream":
                    result = [item for item in result if isinstance(item, TurnEnd)][0].reply
                assert result.usage.output_tokens == 20
            ids.append(session.token_ids)
    assert ids[0] == ids[1] == ids[2]


def test_nothing_happens_before_the_first_event_is_asked_for() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        never_started = session.stream("Hi.")
        assert (session.token_ids, session.messages) == ([], [])
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        del never_started
        require_whole(session)
        refused = session.stream({"role": "robot", "content": "x"})
        with pytest.raises(InputError, match="robot"):
            next(refused)
        with says(engine, f"Fine.{END}"):
            session.send("Well?")
        require_whole(session)


def test_events_are_frozen_and_hold_no_tensor() -> None:
    import torch

    engine = chat_engine("CHATML_THINKING")
    output = f"{THOUGHT}Hi.\n{call_text('greet', name='Ada')}{END}"
    with engine.session(FULL, tools=[greet]) as session:
        with says(engine, output, f"Done.{END}"):
            events = list(session.stream("Greet."))
    kinds = {type(event) for event in events}
    assert kinds == set(EVERY_KIND) == set(typing.get_args(Event))

    def parts(value: Any) -> list[Any]:
        if dataclasses.is_dataclass(value):
            inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
            return [part for item in inner for part in parts(item)]
        if isinstance(value, (list, tuple)):
            return [part for item in value for part in parts(item)]
        return [value]

    for event in events:
        name = dataclasses.fields(event)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, name, None)
        assert not any(isinstance(part, torch.Tensor) for part in parts(event))


def test_a_stream_can_be_read_in_another_thread_than_it_was_made_in() -> None:
    import threading

    engine = chat_engine()
    collected: list[Event] = []
    with engine.session(FULL) as session:
        with says(engine, f"Hello.{END}"):
            stream = session.stream("Hi.")
            thread = threading.Thread(target=lambda: collected.extend(stream))
            thread.start()
            thread.join(timeout=20)
        assert isinstance(collected[-1], TurnEnd)
        require_whole(session)


def test_a_view_taken_from_a_session_is_a_copy() -> None:
    engine = chat_engine()

    def views(session: Session) -> tuple[Any, ...]:
        return session.token_ids, session.messages, session.trace

    with engine.session(FULL, tools=[greet]) as session:
        with says(engine, call_text("greet", name="Ada") + END, f"Done.{END}"):
            session.run("Greet.")
        before = views(session)
        ids, messages, trace = views(session)
        ids.append(1)
        messages[1]["tool_calls"][0]["function"]["arguments"]["name"] = "Bo"
        messages.clear()
        trace.clear()
        assert views(session) == before
        require_whole(session)
