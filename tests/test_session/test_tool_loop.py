"""The tool loop: whatever the model writes and whatever a tool does, the conversation goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sfi_agent import InputError, Session, Tool, ToolResult, ToolStart, TurnEnd
from tests.test_session.conversations import (
    FULL,
    call_text,
    chat_engine,
    encode,
    require_whole,
    says,
)

END = "<|im_end|>"


def find_room(name: str, floor: int = 1) -> dict[str, Any]:
    """Finds a room.

    Args:
        name: Whose room.
        floor: Which floor.
    """
    return {"name": name, "room": 10 * floor + 2}


def fail(reason: str) -> str:
    """Fails.

    Args:
        reason: Why.
    """
    raise LookupError(f"nothing about {reason}")


TOOLS: list[Callable[..., Any]] = [find_room, fail]


def tool_messages(session: Session) -> list[tuple[str, str]]:
    """Call id and content of every tool message, in order."""
    return [
        (message["tool_call_id"], message["content"])
        for message in session.messages
        if message["role"] == "tool"
    ]


def test_model_tool_model() -> None:
    engine = chat_engine()
    with engine.session(FULL, system="Be kind.", tools=TOOLS) as session:
        first = f"Let me look.\n{call_text('find_room', name='Ada', floor=3)}{END}"
        with says(engine, first, f"Room 32.{END}") as script:
            reply = session.run("Where is Ada?")
        assert script.left == 0
        assert (reply.text, reply.finish_reason, reply.tool_calls) == ("Room 32.", "stop", ())
        assert [message["role"] for message in session.messages] == [
            *["system", "user", "assistant", "tool", "assistant"]
        ]
        assistant, result = session.messages[2:4]
        assert assistant["content"] == "Let me look."
        call = assistant["tool_calls"][0]
        assert call["function"] == {"name": "find_room", "arguments": {"name": "Ada", "floor": 3}}
        assert result == {
            "role": "tool",
            "tool_call_id": call["id"],
            "name": "find_room",
            "content": '{"name": "Ada", "room": 32}',
        }
        require_whole(session)


def test_several_calls_of_a_turn_are_answered_together_and_in_order() -> None:
    engine = chat_engine()
    calls = "\n".join(
        [
            call_text("find_room", name="Ada"),
            call_text("fail", reason="Bo"),
            call_text("find_room", name="Cy", floor=2),
        ]
    )
    with engine.session(FULL, tools=TOOLS) as session:
        with says(
            engine, f"{calls}{END}", f"{call_text('find_room', name='Di')}{END}", f"Ok.{END}"
        ):
            session.run("Where are they?")
        assert tool_messages(session) == [
            ("call_0", '{"name": "Ada", "room": 12}'),
            ("call_1", "fail failed: LookupError: nothing about Bo"),
            ("call_2", '{"name": "Cy", "room": 22}'),
            ("call_3", '{"name": "Di", "room": 12}'),
        ]
        require_whole(session)


BAD_CALLS: dict[str, tuple[str, str]] = {
    "an exception": (call_text("fail", reason="Bo"), "fail failed: LookupError"),
    "an unknown tool": (call_text("rm", path="/"), "There is no tool 'rm'. Known tools: fail, "),
    "a missing argument": (call_text("find_room"), "find_room was not run"),
    "a wrong type": (call_text("find_room", name="A", floor="x"), "find_room was not run"),
    "an unknown argument": (call_text("find_room", name="A", x=1), "find_room was not run"),
    "broken JSON": (
        '<tool_call>\n{"name": "find_room", "arguments": {"name": }}\n</tool_call>',
        "could not be read: its JSON is broken at character",
    ),
    "no name": ('<tool_call>\n{"arguments": {}}\n</tool_call>', 'it has no "name"'),
    "no JSON": ("<tool_call>\nfind_room(Ada)\n</tool_call>", "could not be read"),
    "a call cut off": ('<tool_call>\n{"name": "find_room", "argu', "it may be cut off"),
}


@pytest.mark.parametrize(("call", "answer"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_call_that_goes_wrong_is_answered_and_the_loop_goes_on(call: str, answer: str) -> None:
    engine = chat_engine()
    good = call_text("find_room", name="Ada")
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, f"{call}{END}", f"{good}{END}", f"Room 12.{END}"):
            reply = session.run("Where is Ada?")
        assert (reply.text, reply.finish_reason) == ("Room 12.", "stop")
        (first_id, first), (second_id, second) = tool_messages(session)
        assert answer in first and (first_id, second_id) == ("call_0", "call_1")
        assert second == '{"name": "Ada", "room": 12}'
        require_whole(session)


def test_a_good_call_beside_a_bad_one_is_run() -> None:
    engine = chat_engine()
    turn = f"<tool_call>\n{{nonsense\n</tool_call>\n{call_text('find_room', name='Ada')}{END}"
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, turn, f"Fine.{END}"):
            session.run("Where?")
        bad, good = [content for _, content in tool_messages(session)]
        assert "could not be read" in bad and good == '{"name": "Ada", "room": 12}'


def test_the_turn_limit_ends_a_run_and_the_next_message_closes_its_calls() -> None:
    engine = chat_engine()
    call = f"{call_text('find_room', name='Ada')}{END}"
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, call, call):
            reply = session.run("Where is Ada?", max_turns=2)
        assert reply.finish_reason == "max_turns"
        assert [item.name for item in reply.tool_calls] == ["find_room"]
        assert len(tool_messages(session)) == 1
        with says(engine, f"Sorry.{END}"):
            session.send("Then stop.")
        ((_, ran), (call_id, unrun)) = tool_messages(session)
        assert "room" in ran and call_id == "call_1" and "not run" in unrun
        require_whole(session)


@pytest.mark.parametrize("max_turns", [0, -1, True, 1.5, None])
def test_an_unusable_turn_limit_is_refused(max_turns: Any) -> None:
    with chat_engine().session(FULL, tools=TOOLS) as session:
        for action in (session.run, session.stream):
            with pytest.raises(InputError, match="max_turns"):
                action("Where?", max_turns=max_turns)
        assert session.token_ids == []


def test_the_token_limit_ends_a_run_inside_a_call() -> None:
    engine = chat_engine()
    call = call_text("find_room", name="Ada")
    cut = len(encode(engine, call)) - 6
    config = FULL.replace(sampling={"max_new_tokens": cut})
    with engine.session(config, tools=TOOLS) as session:
        with says(engine, f"{call}{END}"):
            reply = session.run("Where is Ada?")
        assert (reply.finish_reason, reply.usage.output_tokens) == ("length", cut)
        assert reply.tool_calls[0].error is not None
        assert tool_messages(session) == []
        with says(engine, f"Sorry.{END}"):
            assert session.run("Go on.").finish_reason == "stop"
        ((call_id, content),) = tool_messages(session)
        assert call_id == "call_0" and "may be cut off" in content
        require_whole(session)


def test_send_returns_calls_and_takes_their_results() -> None:
    engine = chat_engine()
    turn = f"{call_text('find_room', name='Ada')}\n{call_text('find_room', name='Bo')}{END}"
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, turn):
            reply = session.send("Where?")
        assert reply.finish_reason == "tool_calls"
        ids = [call.id for call in reply.tool_calls]
        before = session.token_ids
        answers = [{"role": "tool", "tool_call_id": item, "content": item * 2} for item in ids]
        with pytest.raises(InputError, match="no answer to call_1"):
            session.send(answers[:1])
        with pytest.raises(InputError, match="call_7"):
            session.send([{**answers[0], "tool_call_id": "call_7"}])
        assert session.token_ids == before
        with says(engine, f"Thanks.{END}"):
            reply = session.send([*answers, {"role": "user", "content": "Well?"}])
        assert reply.finish_reason == "stop"
        assert tool_messages(session) == [("call_0", "call_0" * 2), ("call_1", "call_1" * 2)]
        assert session.messages[-2] == {"role": "user", "content": "Well?"}
        with pytest.raises(InputError, match="no call waits"):
            session.send(answers)
        require_whole(session)


def test_calls_that_nobody_answers_are_told_apart_from_calls_that_failed() -> None:
    engine = chat_engine()
    turn = f"{call_text('find_room', name='Ada')}\n<tool_call>\n{{\n</tool_call>{END}"
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, turn):
            session.send("Where?")
        with says(engine, f"Fine.{END}"):
            session.send("Never mind.")
        ((_, first), (_, second)) = tool_messages(session)
        assert "not run" in first and "JSON is broken" in second
        require_whole(session)


def test_results_of_tools_that_ran_survive_an_overflow() -> None:
    engine = chat_engine(context_tokens=400)
    ran: list[str] = []

    def dump(topic: str) -> str:
        """Dumps everything.

        Args:
            topic: What about.
        """
        ran.append(topic)
        return "long " * (300 if topic == "all" else 1)

    from sfi_agent import ContextOverflowError

    with engine.session(FULL.replace(sampling={"max_new_tokens": 48}), tools=[dump]) as session:
        with says(engine, call_text("dump", topic="all") + END):
            with pytest.raises(ContextOverflowError):
                session.run("Tell me.")
        assert ran == ["all"]
        ids = session.token_ids
        with pytest.raises(ContextOverflowError):
            session.send("Shorter, please.")
        assert session.token_ids == ids
        with says(engine, f"Fine.{END}"):
            session.send({"role": "tool", "tool_call_id": "call_0", "content": "too long"})
        assert tool_messages(session) == [("call_0", "too long")]
        require_whole(session)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_of_a_tool_reaches_the_caller(kind: type[BaseException]) -> None:
    engine = chat_engine()

    def end() -> str:
        """Ends the program."""
        raise kind

    turn = "\n".join([call_text("find_room", name="Ada"), call_text("end")]) + END
    tools: list[Any] = [Tool(find_room, parallel=False), end]
    with engine.session(FULL, tools=tools) as session:
        with says(engine, turn), pytest.raises(kind):
            session.run("Where?")
        with says(engine, f"Fine.{END}"):
            session.send("Where were we?")
        ((_, first), (_, second)) = tool_messages(session)
        assert first == '{"name": "Ada", "room": 12}' and "before it finished" in second
        require_whole(session)


def test_a_session_without_tools_takes_nothing_for_a_call() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, call_text("find_room", name="Ada") + END):
            reply = session.run("Where is Ada?")
        assert (reply.finish_reason, reply.tool_calls) == ("stop", ())
        assert "find_room" in reply.text


def test_tools_may_change_under_the_session_but_not_its_prompt() -> None:
    engine = chat_engine()
    given: list[Callable[..., Any]] = [find_room]
    with engine.session(FULL, tools=given) as session, engine.session(FULL, tools=TOOLS) as sorted_:
        given.append(fail)
        for item in (session, sorted_):
            with says(engine, f"Hi.{END}"):
                item.send("Hello.")
        tokenizer: Any = engine.tokenizer
        text, sorted_text = (tokenizer.decode(item.token_ids) for item in (session, sorted_))
        assert "fail" not in text
        names = [sorted_text.index(f'"name": "{name}"') for name in ("fail", "find_room")]
        assert names == sorted(names)


def test_a_stream_of_the_loop_has_every_turn_and_result() -> None:
    engine = chat_engine()
    call = f"{call_text('find_room', name='Ada')}{END}"
    with engine.session(FULL, tools=TOOLS) as session:
        with says(engine, call, call, f"Room 12.{END}"):
            events = list(session.stream("Where?"))
        kinds = [event for event in events if isinstance(event, (TurnEnd, ToolStart, ToolResult))]
        assert [type(event).__name__ for event in kinds] == [
            *["TurnEnd", "ToolStart", "ToolResult"] * 2,
            "TurnEnd",
        ]
        reasons = [event.reply.finish_reason for event in kinds if isinstance(event, TurnEnd)]
        assert reasons == ["tool_calls", "tool_calls", "stop"]
