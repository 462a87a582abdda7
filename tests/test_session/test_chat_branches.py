"""Forks, rewinds and raw decoding inside a conversation."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import ConfigError, InputError, NothingPendingError, Session, SessionStateError
from tests.test_guarantees.play import close
from tests.test_session.conversations import (
    DENSE,
    FULL,
    call_text,
    chat_engine,
    encode,
    policy,
    require_whole,
    says,
)

END = "<|im_end|>"


def note(text: str) -> str:
    """Takes a note.

    Args:
        text: What to note.
    """
    return f"noted {text}"


def talk(session: Session, *turns: tuple[str, list[str]]) -> list[Any]:
    """Run turns of the tool loop: what the user says, and what the model then says."""
    replies = []
    for message, outputs in turns:
        with says(session.engine, *outputs):
            replies.append(session.run(message))
    return replies


FIRST = ("Note Ada.", [call_text("note", text="Ada") + END, f"Noted.{END}"])
TWO_CALLS = (
    "Note Bo and Cy.",
    [f"{call_text('note', text='Bo')}\n{call_text('note', text='Cy')}{END}", f"Both.{END}"],
)
LAST = ("Thanks.", [f"Welcome. Bye.{END}"])


# ---------------------------------------------------------------- rewind


@pytest.mark.parametrize("template", ["CHATML", "CHATML_THINKING", "CHANGES_THE_CLOSE"])
@pytest.mark.parametrize("turns_after", [1, 2])
def test_rewinding_over_turns_is_never_having_been_there(template: str, turns_after: int) -> None:
    engine = chat_engine(template)
    tools = [] if template == "CHANGES_THE_CLOSE" else [note]
    first, later = ("Hi.", [f"Hello.{END}"]), [("More.", [f"Odd  answer.{END}"]), LAST]
    if tools:
        first, later = FIRST, [TWO_CALLS, LAST]
    with (
        engine.session(FULL, tools=tools) as session,
        engine.session(FULL, tools=tools) as straight,
    ):
        for item in (session, straight):
            talk(item, first)
        mark = session.mark()
        talk(session, *later[:turns_after])
        session.rewind(mark)
        assert session.messages == straight.messages
        assert session.token_ids == straight.token_ids
        assert [step.position for step in session.trace] == [
            step.position for step in straight.trace
        ]
        require_whole(session)
        last = ("Now go on.", [call_text("note", text="Di") + END, f"Fine.{END}"])
        goes_on = last if tools else ("Now go on.", [f"Fine.{END}"])
        (reply,), (expected,) = talk(session, goes_on), talk(straight, goes_on)
        assert reply.usage == expected.usage
        assert session.messages == straight.messages
        assert session.token_ids == straight.token_ids
        require_whole(session)


def test_rewinding_behind_a_history_that_was_rendered_again() -> None:
    engine = chat_engine("CHANGES_THE_CLOSE")
    with engine.session(FULL) as session:
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        mark = session.mark()
        state = (session.token_ids, session.messages)
        letters = [token for letter in "Spelled out." for token in encode(engine, letter)]
        with says(engine, [*letters, *encode(engine, END)]):
            session.send("More.")
        late_mark = session.mark()
        with says(engine, f"Bye.{END}"):
            usage = session.send("And?").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        assert mark.token_count < usage.cached_tokens < late_mark.token_count
        with pytest.raises(SessionStateError, match="no longer valid"):
            session.rewind(late_mark)
        session.rewind(mark)
        assert (session.token_ids, session.messages) == state
        with says(engine, f"Good.{END}"):
            session.send("Well?")
        assert [item["content"] for item in session.messages] == ["Hi.", "Hello.", "Well?", "Good."]
        require_whole(session)


def test_marks_of_earlier_places_stay_valid_and_later_ones_do_not() -> None:
    engine = chat_engine()
    with engine.session(FULL, tools=[note]) as session:
        start = session.mark()
        talk(session, FIRST)
        middle = session.mark()
        talk(session, TWO_CALLS)
        late = session.mark()
        session.rewind(middle)
        with pytest.raises(SessionStateError, match="no longer valid"):
            session.rewind(late)
        talk(session, LAST, LAST, LAST)
        with pytest.raises(SessionStateError, match="no longer valid"):
            session.rewind(late)
        session.rewind(middle)
        session.rewind(start)
        assert (session.token_ids, session.messages, session.trace) == ([], [], [])
        talk(session, FIRST)
        require_whole(session)


def test_a_rewind_into_an_answer_keeps_the_calls_it_still_holds() -> None:
    engine = chat_engine()
    with engine.session(FULL, tools=[note]) as session:
        talk(session, FIRST)
        start = len(session.token_ids)
        (reply,) = talk(session, TWO_CALLS)
        talk(session, LAST)
        one_call = encode(engine, call_text("note", text="Bo"))
        prompt = session.token_ids[start:].index(one_call[0]) + start
        session.rewind(session.mark(prompt + len(one_call)))
        message = session.messages[-1]
        assert [call["id"] for call in message["tool_calls"]] == ["call_1"]
        assert message["tool_calls"][0]["function"]["arguments"] == {"text": "Bo"}
        require_whole(session)
        with says(engine, f"\n{call_text('note', text='Ed')}{END}"):
            session.decode([], max_new_tokens=200, stop_ids=encode(engine, END))
        calls = session.messages[-1]["tool_calls"]
        assert [(call["id"], call["function"]["arguments"]["text"]) for call in calls] == [
            ("call_1", "Bo"),
            ("call_2", "Ed"),
        ]
        with says(engine, f"Ok.{END}"):
            session.send("Well?")
        answers = [item for item in session.messages if item["role"] == "tool"][-2:]
        assert [item["tool_call_id"] for item in answers] == ["call_1", "call_2"]
        require_whole(session)


def test_a_rewind_into_thoughts_that_the_template_opened_reads_them_as_thoughts() -> None:
    engine = chat_engine("OPENS_THOUGHTS")
    with engine.session(FULL) as session:
        with says(engine, f"Who is it?\n</think>\n\nShe is there.{END}"):
            reply = session.send("Where is Ada?")
        assert (reply.reasoning, reply.text) == ("Who is it?", "She is there.")
        whole = session.messages
        session.rewind(session.mark(len(session.token_ids) - 3))
        message = session.messages[-1]
        assert message["reasoning_content"] == "Who is it?"
        assert "She is there.".startswith(message["content"])
        session.rewind(session.mark(reply.usage.prompt_tokens + 4))
        message = session.messages[-1]
        assert message["content"] == "" and "Who is it?".startswith(message["reasoning_content"])
        with says(engine, encode(engine, f"Who is it?\n</think>\n\nShe is there.{END}")[4:]):
            session.decode([], max_new_tokens=200, stop_ids=encode(engine, END))
        assert session.messages == whole


def test_a_rewind_to_the_end_of_a_prompt_asks_again() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, f"First answer.{END}"):
            reply = session.send("A question?")
        mark = session.mark(reply.usage.prompt_tokens)
        session.rewind(mark)
        assert [item["role"] for item in session.messages] == ["user"]
        with says(engine, f"Second, other answer.{END}"):
            session.decode([], max_new_tokens=100, stop_ids=encode(engine, END))
        assert session.messages[-1] == {"role": "assistant", "content": "Second, other answer."}
        with says(engine, f"Fine.{END}"):
            usage = session.send("And now?").usage
        assert usage.reuse_lost_reason is None
        require_whole(session)
        session.rewind(mark)
        with says(engine, f"Third.{END}"):
            usage = session.send("Or rather this?").usage
        assert usage.reuse_lost_reason in (None, "history_edited")
        assert [item["content"] for item in session.messages] == [
            "A question?",
            "Or rather this?",
            "Third.",
        ]
        require_whole(session)


def test_a_rewind_inside_a_prompt_renders_the_chat_again() -> None:
    engine = chat_engine()
    with engine.session(FULL, system="Be kind and careful.") as session:
        with says(engine, f"Yes.{END}"):
            session.send("A long question, is it not?")
        session.rewind(session.mark(12))
        require_whole(session)
        with says(engine, f"Fine.{END}"):
            usage = session.send("Another one.").usage
        assert usage.cached_tokens >= 11
        assert usage.prompt_tokens == usage.cached_tokens + usage.prefilled_tokens
        require_whole(session)


def test_unusable_marks_are_refused() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session, engine.session(FULL) as other:
        with says(engine, f"Yes.{END}"):
            session.send("Hi.")
        for count in (-1, len(session.token_ids) + 1):
            with pytest.raises(InputError, match="the ids the session has"):
                session.mark(count)
        with pytest.raises(InputError, match="another session"):
            session.rewind(other.mark())
        with session.fork() as child, pytest.raises(InputError, match="another session"):
            child.rewind(session.mark())


# ---------------------------------------------------------------- fork


def test_a_fork_goes_on_under_another_policy_and_leaves_its_parent_alone() -> None:
    engine = chat_engine()
    with engine.session(FULL, system="Be kind.", tools=[note]) as parent:
        talk(parent, FIRST)
        state = (parent.token_ids, parent.messages, parent.trace, parent.stats)
        logits = parent.next_logits()
        with parent.fork(DENSE) as child, parent.fork() as twin:
            assert (child.config, twin.config) == (DENSE, FULL)
            assert (child.token_ids, child.messages) == (parent.token_ids, parent.messages)
            assert child.id != parent.id
            (reply,) = talk(child, TWO_CALLS)
            assert reply.usage.cached_tokens > 0 and reply.usage.reuse_lost_reason is None
            assert {step.kind for step in reply.steps} == {"slow"}
            talk(twin, LAST)
            assert [item["content"] for item in child.messages if item["role"] == "tool"] == [
                "noted Ada",
                "noted Bo",
                "noted Cy",
            ]
            require_whole(child)
            require_whole(twin)
            assert (parent.token_ids, parent.messages, parent.trace, parent.stats) == state
            assert bool((parent.next_logits() == logits).all())
            talk(parent, LAST)
            assert parent.token_ids == twin.token_ids
        require_whole(parent)


def test_a_fork_outlives_its_parent() -> None:
    engine = chat_engine()
    parent = engine.session(FULL)
    with says(engine, f"Yes.{END}"):
        parent.send("Hi.")
    child = parent.fork()
    parent.close()
    with child:
        with says(engine, f"Still here.{END}"):
            assert child.send("Well?").text == "Still here."
        require_whole(child)


def test_a_fork_between_call_and_answer_answers_by_itself() -> None:
    engine = chat_engine()
    with engine.session(FULL, tools=[note]) as parent:
        with says(engine, call_text("note", text="Ada") + END):
            (call,) = parent.send("Note Ada.").tool_calls
        with parent.fork() as child:
            answer = {"role": "tool", "tool_call_id": call.id, "content": "of the child"}
            with says(engine, f"Ok.{END}"):
                child.send(answer)
            with says(engine, f"Ok.{END}"):
                parent.send({**answer, "content": "of the parent"})
            for session, content in ((child, "of the child"), (parent, "of the parent")):
                assert session.messages[2]["content"] == content
                require_whole(session)


def test_forks_sample_differently_with_another_seed() -> None:
    engine = chat_engine()
    config = policy(sampling={"temperature": 1.0, "seed": 3, "max_new_tokens": 16})
    with engine.session(config) as parent:
        parent.decode(encode(engine, "hello"), max_new_tokens=4)
        with parent.fork() as same, parent.fork(seed=4) as other:
            texts = [item.decode([], max_new_tokens=16) for item in (parent, same, other)]
        assert texts[0] == texts[1] != texts[2]
        with pytest.raises(ConfigError, match="seed"):
            parent.fork(seed=-1)
        with pytest.raises(ConfigError, match="dense_layers"):
            parent.fork(policy(memory={"dense_layers": [99]}))


# ---------------------------------------------------------------- raw decoding


def test_decode_goes_on_with_an_answer_that_was_cut_off() -> None:
    engine = chat_engine()
    whole = f"One two three. Four five.{END}"
    ids = encode(engine, whole)
    with (
        engine.session(FULL.replace(sampling={"max_new_tokens": 5})) as session,
        engine.session(FULL) as straight,
    ):
        with says(engine, whole):
            assert session.send("Count.").finish_reason == "length"
        with says(engine, ids[5:]):
            assert session.decode([], max_new_tokens=50, stop_ids=encode(engine, END)) == ids[5:]
        with says(engine, whole):
            straight.send("Count.")
        assert session.messages == straight.messages
        assert session.token_ids == straight.token_ids
        require_whole(session)
        assert close(session.next_logits(), straight.next_logits())
        for item in (session, straight):
            with says(engine, f"Ok.{END}"):
                assert item.send("More.").usage.reuse_lost_reason is None
        assert session.messages == straight.messages


def test_raw_ids_and_messages_do_not_mix() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        mark = session.mark()
        session.decode([10, 11, 12], max_new_tokens=4)
        assert session.messages == [] and len(session.token_ids) == 7
        ids = session.token_ids
        with pytest.raises(InputError, match="ids without messages"):
            session.send("Hi.")
        assert session.token_ids == ids
        session.rewind(mark)
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        require_whole(session)
        mark = session.mark()
        session.decode([13], max_new_tokens=0)
        assert [item["role"] for item in session.messages] == ["user", "assistant"]
        with pytest.raises(InputError, match="ids without messages"):
            session.send("Hi.")
        session.rewind(mark)
        with says(engine, f"Hello.{END}"):
            assert session.send("Hi.").usage.reuse_lost_reason is None
        require_whole(session)


def test_nothing_to_go_on_from() -> None:
    with chat_engine().session(FULL) as session:
        with pytest.raises(NothingPendingError):
            session.decode([], max_new_tokens=3)
        with pytest.raises(NothingPendingError):
            session.next_logits()
        assert session.decode([5, 6], max_new_tokens=0) == []
        assert session.token_ids == [5, 6]
        assert len(session.decode([], max_new_tokens=3)) == 3
