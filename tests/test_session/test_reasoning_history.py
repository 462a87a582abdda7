"""`history.reasoning: template`: earlier reasoning leaves the history as the template wants it."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfi_agent import Engine, Session, SessionConfig, SessionStateError, Step
from sfi_agent.session.templates.dropped_reasoning import dropped_reasoning
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
from tests.test_session.published_chats import chat_of, model_output, named, published_engine

END = "<|im_end|>"
THOUGHT = "<think>\nWho is it?\n</think>\n\n"
DROPS = FULL.replace(history={"reasoning": "template"})


def look_up(query: str) -> str:
    """Looks something up.

    Args:
        query: What to look for.
    """
    return f"{query} is in room 12"


def text_of(session: Session) -> str:
    tokenizer: Any = session.engine.tokenizer
    return str(tokenizer.decode(session.token_ids))


def rendered(session: Session, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of a chat, the reasoning passed along."""
    tokenizer: Any = session.engine.tokenizer
    assert session._chat is not None
    ids = tokenizer.apply_chat_template(
        messages,
        tools=list(session._chat.tools.schemas) or None,
        add_generation_prompt=True,
        return_dict=False,
    )
    return list(ids)


@pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
def test_thoughts_are_gone_at_the_next_user_message(config: SessionConfig) -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(config.replace(history={"reasoning": "template"})) as session:
        with says(engine, f"{THOUGHT}Room 12.{END}"):
            first = session.send("Where is Ada?")
        assert (first.reasoning, first.text) == ("Who is it?", "Room 12.")
        past, ids = session.messages, session.token_ids
        assert past[1]["reasoning_content"] == "Who is it?"
        with says(engine, f"{THOUGHT}Room 3.{END}"):
            usage = session.send("And Bo?").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        # Back to where the answer began; only the answer and the new message are processed again.
        assert usage.cached_tokens == first.usage.prompt_tokens
        expected = rendered(session, [*past, {"role": "user", "content": "And Bo?"}])
        assert session.token_ids[: usage.prompt_tokens] == expected
        assert expected[: usage.cached_tokens] == ids[: usage.cached_tokens]
        assert text_of(session).count("Who is it?") == 1  # that of the last answer
        require_whole(session, exact=config is not SPARSE)
        with says(engine, f"Fine.{END}"):
            usage = session.send("Thanks.").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        assert "Who is it?" not in text_of(session)
        # Nothing is left to drop: the next turn is appended.
        before = len(session.token_ids)
        with says(engine, f"Bye.{END}"):
            usage = session.send("Bye.").usage
        assert (usage.reuse_lost_reason, usage.cached_tokens) == (None, before - 1)
        require_whole(session, exact=config is not SPARSE)


def test_messages_say_what_the_ids_hold() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS, system="Be kind.") as session:
        for number in range(3):
            with says(engine, f"{THOUGHT}Answer {number}.{END}"):
                session.send(f"Question {number}?")
            contents = [message["content"] for message in session.messages]
            pairs = [(f"Question {n}?", f"Answer {n}.") for n in range(number + 1)]
            assert contents == ["Be kind.", *(text for pair in pairs for text in pair)]
            thoughts = [message.get("reasoning_content") for message in session.messages]
            assert thoughts == [None] * (2 * number + 2) + ["Who is it?"]
            assert text_of(session).count("Who is it?") == 1


def test_tool_rounds_keep_their_reasoning_until_the_user_speaks() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS, tools=[look_up]) as session:
        call = call_text("look_up", query="Ada")
        with says(engine, *[f"{THOUGHT}{call}{END}"] * 2, f"{THOUGHT}Room 12.{END}"):
            reply = session.run("Where is Ada?")
        assert reply.usage.reuse_lost_reason is None
        assert text_of(session).count("Who is it?") == 3
        past = session.messages
        with says(engine, f"Room 3.{END}"):
            usage = session.send("And Bo?").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        assert "Who is it?" not in text_of(session)
        expected = rendered(session, [*past, {"role": "user", "content": "And Bo?"}])
        assert session.token_ids[: usage.prompt_tokens] == expected
        assert [message["role"] for message in session.messages] == [
            *["user", "assistant", "tool", "assistant", "tool", "assistant"],
            *["user", "assistant"],
        ]
        require_whole(session)


def test_what_the_model_wrote_before_its_first_thought_stays_verbatim() -> None:
    engine = chat_engine("CHATML_THINKING")
    odd = '<tool_call>{"arguments":{"query":"\\u00e9"},"name":"look_up"}</tool_call>'
    with engine.session(DROPS, tools=[look_up]) as session:
        with says(engine, odd + END, f"Room 12.{END}"):
            session.run("Where is Ada?")
        with says(engine, f"{THOUGHT}Room 3.{END}"):
            second = session.send("And Bo?").usage
        assert second.reuse_lost_reason is None
        with says(engine, f"Bye.{END}"):
            usage = session.send("Bye.").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        # The template would write the odd call otherwise; it was not asked to.
        assert usage.cached_tokens == second.prompt_tokens
        assert odd in text_of(session)
        require_whole(session)


def test_without_thoughts_every_turn_is_appended() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS, tools=[look_up]) as session:
        for number in range(3):
            before = len(session.token_ids)
            with says(engine, f"Answer {number}.{END}"):
                usage = session.send("Well?").usage
            assert usage.reuse_lost_reason is None
            assert usage.cached_tokens == max(0, before - 1)


def test_marks_behind_the_place_are_no_longer_valid() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS) as session:
        with says(engine, f"{THOUGHT}Room 12.{END}"):
            prompt_tokens = session.send("Where is Ada?").usage.prompt_tokens
        at_prompt, at_end = session.mark(prompt_tokens), session.mark()
        with says(engine, f"Room 3.{END}"):
            session.send("And Bo?")
        with pytest.raises(SessionStateError, match="no longer valid"):
            session.rewind(at_end)
        later = session.mark()
        session.rewind(later)
        session.rewind(at_prompt)
        assert len(session.token_ids) == prompt_tokens
        assert session.messages == [{"role": "user", "content": "Where is Ada?"}]
        require_whole(session)


def test_a_rewind_into_the_answer_and_a_cut_answer_lose_their_thoughts_as_well() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS) as session:
        with says(engine, f"{THOUGHT}Room 12 on the left.{END}"):
            prompt_tokens = session.send("Where is Ada?").usage.prompt_tokens
        session.rewind(session.mark(prompt_tokens + len(encode(engine, f"{THOUGHT}Room 12"))))
        assert session.messages[1]["content"] == "Room 12"
        with says(engine, f"Room 3.{END}"):
            usage = session.send("And Bo?").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        assert "Who is it?" not in text_of(session) and "Room 12<|im_end|>" in text_of(session)
        require_whole(session)


def test_forks_choose_for_themselves() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(FULL) as parent:
        with says(engine, f"{THOUGHT}Room 12.{END}"):
            parent.send("Where is Ada?")
        ids, messages = parent.token_ids, parent.messages
        with parent.fork(DROPS) as drops, parent.fork() as keeps:
            for session, reason, count in (
                (drops, "template_rewrote_history", 0),
                (keeps, None, 1),
            ):
                with says(engine, f"Room 3.{END}"):
                    assert session.send("And Bo?").usage.reuse_lost_reason == reason
                assert text_of(session).count("Who is it?") == count
                require_whole(session)
            with drops.fork() as child:
                with says(engine, f"{THOUGHT}Yes.{END}", f"No.{END}"):
                    child.send("Sure?")
                    child.send("Really?")
                assert "Who is it?" not in text_of(child)
        assert (parent.token_ids, parent.messages) == (ids, messages)


def test_a_turn_that_does_not_begin_gives_the_thoughts_back() -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS) as session:
        with says(engine, f"{THOUGHT}Room 12.{END}"):
            session.send("Where is Ada?")
        mark = session.mark()
        ids, messages, trace = session.token_ids, session.messages, session.trace
        handle = engine.model.register_forward_pre_hook(fail)
        try:
            with pytest.raises(StepFailed):
                session.send("And Bo?")
        finally:
            handle.remove()
        assert (session.token_ids, session.messages, session.trace) == (ids, messages, trace)
        session.rewind(mark)
        require_whole(session)
        with says(engine, f"Room 3.{END}"):
            usage = session.send("And Bo?").usage
        assert usage.reuse_lost_reason == "template_rewrote_history"
        require_whole(session)


class StepFailed(Exception):
    """Raised in place of a forward pass."""


def fail(*_: Any) -> None:
    raise StepFailed


def test_the_log_says_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    engine = chat_engine("CHATML_THINKING")
    with engine.session(DROPS) as session, caplog.at_level(logging.INFO, "sfi_agent"):
        with says(engine, f"{THOUGHT}Room 12.{END}", f"Yes.{END}"):
            session.send("Where is Ada?")
            session.send("Sure?")
    last = caplog.messages[-1]
    assert "earlier reasoning is left out" in last and "history has" in last


# ---------------------------------------------------------------- random conversations

THOUGHTS = st.one_of(st.none(), st.sampled_from(["hm", "<Ada>", "1e3 é"]))
TURNS = st.tuples(
    st.lists(THOUGHTS, max_size=2),  # rounds of calls with their thoughts
    THOUGHTS,
    st.sampled_from(["whole", "cut", "rewound"]),
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.lists(TURNS, min_size=2, max_size=4))
def test_no_thought_outlives_its_turn(
    turns: list[tuple[list[str | None], str | None, str]],
) -> None:
    engine = chat_engine("CHATML_THINKING")
    number = 0

    def think(thought: str | None, text: str) -> str:
        nonlocal number
        number += 1
        return f"<think>\nT{number}. {thought}\n</think>\n\n{text}{END}" if thought else text + END

    with engine.session(DROPS, tools=[look_up]) as session:
        for rounds, last, end in turns:
            first = number + 1
            outputs = [think(item, call_text("look_up", query="Ada")) for item in rounds]
            outputs.append(think(last, "Room 12."))
            mark = session.mark()
            most = {"cut": 5, "whole": 512, "rewound": 512}[end]
            with says(engine, *outputs):
                for event in session.stream("Where is Ada?"):
                    if isinstance(event, Step):
                        most -= 1
                        if most == 0:
                            session.cancel()
            held = [n for n in range(1, number + 1) if f"T{n}. " in text_of(session)]
            assert all(n >= first for n in held)
            spoken = " ".join(item.get("reasoning_content", "") for item in session.messages)
            assert [n for n in range(1, number + 1) if f"T{n}. " in spoken] == held
            require_whole(session)
            if end == "rewound" and mark.token_count:
                # Refused where the turn itself went back behind the mark, to leave thoughts out.
                with suppress(SessionStateError):
                    session.rewind(mark)
                require_whole(session)


# ---------------------------------------------------------------- published templates

THINKERS = {
    **dict.fromkeys(("qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "gptoss"), True),
    **dict.fromkeys(("nemotron_3_nano", "lfm2_2_5", "lfm2_2_5_v2"), True),
    **dict.fromkeys(("qwen3_8", "muse_glimmer"), False),
}
"""Whether the template drops the reasoning of earlier turns."""


def answered(engine: Engine, name: str, past: list[dict[str, Any]], answer: dict[str, Any]) -> Any:
    """The model says what the template would make of an answer, and stops."""
    chat = chat_of(name)
    _, ids = model_output(chat, past, answer)
    stop = engine.tokenizer.convert_tokens_to_ids  # type: ignore[union-attr]
    stops = [index for index in chat.stops if index != stop("<|observation|>")]
    return says(engine, [*ids, min(stops)])


@pytest.mark.parametrize("name", named(THINKERS))
def test_published_templates_decide(name: str) -> None:
    engine = published_engine(name)
    thoughtful = {"role": "assistant", "content": "Room 12.", "reasoning_content": "Who is it?"}
    asked = [{"role": "user", "content": "Where is Ada?"}]
    chat = [*asked, thoughtful, {"role": "user", "content": "And Bo?"}]
    assert dropped_reasoning(chat_of(name).template, chat) == ((1,) if THINKERS[name] else ())
    with engine.session(DROPS) as session:
        with answered(engine, name, asked, thoughtful):
            first = session.send("Where is Ada?")
        assert (first.reasoning, first.text) == ("Who is it?", "Room 12.")
        with answered(engine, name, chat, thoughtful):
            usage = session.send("And Bo?").usage
        reason = "template_rewrote_history" if THINKERS[name] else None
        assert usage.reuse_lost_reason == reason
        assert "Who is it?" in text_of(session)
        prompt = session.token_ids[: usage.prompt_tokens]
        tokenizer: Any = engine.tokenizer
        if THINKERS[name]:
            assert prompt == rendered(session, chat)
            assert usage.cached_tokens >= first.usage.prompt_tokens - 3
            assert "Who is it?" not in tokenizer.decode(prompt)
            assert "reasoning_content" not in session.messages[1]
        else:
            assert "Who is it?" in tokenizer.decode(prompt)
            assert session.messages[1]["reasoning_content"] == "Who is it?"
        require_whole(session)
