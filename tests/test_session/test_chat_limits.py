"""Where a conversation ends or cannot begin: context, stop tokens, missing templates, seeds."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import (
    ContextOverflowError,
    Engine,
    InputError,
    SessionConfig,
    TemplateError,
    ToolDefinitionError,
)
from tests.test_session.conversations import (
    DENSE,
    FULL,
    SPARSE,
    chat_engine,
    encode,
    policy,
    require_whole,
    says,
)

END = "<|im_end|>"
CONTEXT_TOKENS = 96


def note(text: str) -> str:
    """Takes a note.

    Args:
        text: What to note.
    """
    return text


# ---------------------------------------------------------------- context


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    engine = chat_engine(context_tokens=CONTEXT_TOKENS)
    with engine.session(FULL) as session:
        with pytest.raises(ContextOverflowError) as caught:
            session.send("word " * CONTEXT_TOKENS)
        assert caught.value.needed_tokens > caught.value.limit_tokens == CONTEXT_TOKENS
        assert (session.token_ids, session.messages) == ([], [])
        with says(engine, f"Hi.{END}"):
            session.send("Hello.")
        state = (session.token_ids, session.messages, session.trace, session.stats)
        mark = session.mark()
        with pytest.raises(ContextOverflowError, match="shorten the input"):
            session.send("word " * CONTEXT_TOKENS)
        assert (session.token_ids, session.messages, session.trace, session.stats) == state
        session.rewind(mark)
        require_whole(session)
        with says(engine, f"Good.{END}"):
            session.send("Short.")
        require_whole(session)


@pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
def test_a_context_that_fills_up_ends_the_answer(config: SessionConfig) -> None:
    engine = chat_engine(context_tokens=CONTEXT_TOKENS)
    with engine.session(config) as session:
        with says(engine, encode(engine, "word " * CONTEXT_TOKENS)):
            reply = session.send("Talk.")
        assert reply.finish_reason == "length"
        assert len(session.token_ids) == CONTEXT_TOKENS
        require_whole(session, exact=config is not SPARSE)
        with pytest.raises(ContextOverflowError):
            session.send("More.")
        with pytest.raises(ContextOverflowError):
            session.decode([], max_new_tokens=1)
        assert len(session.token_ids) == CONTEXT_TOKENS


def test_the_last_place_of_the_context_is_used() -> None:
    engine = chat_engine(context_tokens=CONTEXT_TOKENS)
    with engine.session(FULL) as session:
        session.decode([7] * (CONTEXT_TOKENS - 1), max_new_tokens=1)
        assert len(session.token_ids) == CONTEXT_TOKENS
        with pytest.raises(ContextOverflowError):
            session.decode([7], max_new_tokens=0)
    with engine.session(FULL) as session:
        with pytest.raises(ContextOverflowError):
            session.decode([7] * CONTEXT_TOKENS, max_new_tokens=1)
        assert session.decode([7] * CONTEXT_TOKENS, max_new_tokens=0) == []
        assert len(session.next_logits()) == engine.shape.vocabulary_size


def test_max_new_tokens_ends_an_answer() -> None:
    engine = chat_engine()
    with engine.session(FULL.replace(sampling={"max_new_tokens": 3})) as session:
        with says(engine, f"One two three four five.{END}"):
            reply = session.send("Count.")
        assert (reply.finish_reason, reply.usage.output_tokens) == ("length", 3)
        with says(engine, f"Hi{END}"):
            reply = session.send("Again.")
        assert reply.finish_reason == "stop"
        require_whole(session)


# ---------------------------------------------------------------- stop tokens


def test_another_stop_token_than_the_template_writes_gives_way_to_it() -> None:
    tokenizer: Any = chat_engine().tokenizer
    other_end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    engine = chat_engine(eos_ids=(other_end,))
    with engine.session(FULL) as session:
        with says(engine, "Hello.<|endoftext|>"):
            reply = session.send("Hi.")
        assert (reply.text, reply.finish_reason) == ("Hello.", "stop")
        assert session.token_ids[-1] == other_end
        before = len(session.token_ids)
        with says(engine, f"Bye.{END}"):
            usage = session.send("So?").usage
        assert (usage.cached_tokens, usage.reuse_lost_reason) == (before - 1, None)
        assert other_end not in session.token_ids
        text = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        text += f"<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nBye.{END}"
        assert session.token_ids == encode(engine, text)
        require_whole(session)


def test_a_stop_token_ends_a_turn_whatever_comes_behind_it() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, f"Hello.{END}more text") as script:
            reply = session.send("Hi.")
        assert script.left > 0
        assert (reply.text, reply.finish_reason) == ("Hello.", "stop")
        with says(engine, [*encode(engine, END)]):
            reply = session.send("And?")
        assert (reply.text, reply.usage.output_tokens, reply.finish_reason) == ("", 1, "stop")
        require_whole(session)


# ---------------------------------------------------------------- what is missing


def test_without_a_chat_template_there_are_ids_and_no_messages() -> None:
    engine = chat_engine(None)
    with engine.session(FULL) as session:
        assert len(session.decode(encode(engine, "hello"), max_new_tokens=4)) == 4
        assert session.messages == []
        for action in (session.send, session.run, lambda text: next(iter(session.stream(text)))):
            with pytest.raises(TemplateError, match="session.decode"):
                action("Hi.")
    with pytest.raises(TemplateError):
        engine.session(FULL, system="Be kind.")
    with pytest.raises(TemplateError):
        engine.session(FULL, tools=[note])


def test_without_a_tokenizer_there_are_ids_and_no_messages() -> None:
    engine = Engine(chat_engine().model)
    for config in (DENSE, policy(boundaries=[{"name": "interval", "every_tokens": 4}])):
        with engine.session(config) as session:
            assert len(session.decode([4, 5, 6], max_new_tokens=9)) == 9
            assert session.messages == []
            with pytest.raises(TemplateError, match="no tokenizer"):
                session.send("Hi.")
    with pytest.raises(TemplateError, match="tokenizer"):
        engine.session(DENSE, system="Be kind.")


def test_a_template_without_system_or_tools_says_so_before_anything_runs() -> None:
    engine = chat_engine("GEMMA")
    with pytest.raises(TemplateError, match="system"):
        engine.session(FULL, system="Be kind.")
    with pytest.raises(TemplateError, match="(?i)tools"):
        engine.session(FULL, tools=[note])
    with engine.session(FULL) as session:
        with pytest.raises(TemplateError, match="system"):
            session.send([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
        with says(engine, "Hi.<end_of_turn>"):
            session.send("Hello.")
        with says(engine, "Fine.<end_of_turn>"):
            assert session.send("Well?").usage.reuse_lost_reason is None
        state = session.token_ids
        with pytest.raises(TemplateError, match="alternate"):
            session.send([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
        assert session.token_ids == state
        require_whole(session)
    with pytest.raises(TemplateError, match="(?i)tool"):
        chat_engine("DROPS_TOOL_MESSAGES").session(FULL, tools=[note])


def test_an_engine_says_what_its_template_can_do() -> None:
    report = chat_engine("CHATML").check_template()
    assert report.tools and report.continues_tool_turns and not report.problems
    report = chat_engine("GEMMA").check_template()
    assert not report.system and not report.tools and report.continues_user_turns
    for engine in (chat_engine(None), Engine(chat_engine().model)):
        with pytest.raises(TemplateError):
            engine.check_template()


def test_unusable_messages_change_nothing() -> None:
    engine = chat_engine()
    with engine.session(FULL, system="Be kind.") as session:
        for message in (
            [],
            17,
            {"role": "robot", "content": "x"},
            {"role": "assistant", "content": "x"},
            {"role": "tool", "tool_call_id": "call_0", "content": "x"},
            [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
        ):
            with pytest.raises(InputError):
                session.send(message)  # type: ignore[arg-type]
        assert session.token_ids == []
        assert session.messages == [{"role": "system", "content": "Be kind."}]
        with says(engine, f"Hi.{END}"):
            session.send("Hello.")
        require_whole(session)


def test_unusable_tools_are_refused_when_the_session_is_made() -> None:
    def untyped(thing):  # type: ignore[no-untyped-def]
        """Does something."""

    engine = chat_engine()
    with pytest.raises(ToolDefinitionError, match="untyped"):
        engine.session(FULL, tools=[untyped])
    with pytest.raises(ToolDefinitionError, match="same name"):
        engine.session(FULL, tools=[note, note])


@pytest.mark.parametrize("limit", [-1, True, 1.0, "8"])
def test_unusable_limits_of_decode_are_refused(limit: Any) -> None:
    with chat_engine().session(FULL) as session:
        with pytest.raises(InputError, match="max_new_tokens"):
            session.decode([1], max_new_tokens=limit)
        assert session.token_ids == []


# ---------------------------------------------------------------- a conversation begun elsewhere


def test_a_conversation_can_begin_with_messages_of_another_one() -> None:
    engine = chat_engine()
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": "note", "arguments": {"text": "Ada"}},
    }
    past: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Note Ada."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "name": "note", "content": "Ada"},
        {"role": "user", "content": "And Bo."},
    ]
    with engine.session(FULL, tools=[note]) as session:
        with says(engine, f'<tool_call>\n{{"name": "note", "arguments": {{}}}}\n</tool_call>{END}'):
            reply = session.send(past)
        assert session.messages[:-1] == past
        assert [item.id for item in reply.tool_calls] == ["call_1"]
        require_whole(session)


# ---------------------------------------------------------------- sampling


def test_sampling_depends_on_the_seed_alone() -> None:
    engine = chat_engine()
    spoken = []
    for seed in (1, 1, 2):
        sampling = {"temperature": 1.0, "top_p": 0.9, "seed": seed, "max_new_tokens": 24}
        with engine.session(policy(sampling=sampling)) as session:
            for text in ("Hello.", "Well?"):
                session.send(text)
            spoken.append((session.token_ids, session.messages))
    assert spoken[0] == spoken[1]
    assert spoken[0] != spoken[2]


def test_a_conversation_does_not_depend_on_others_beside_it() -> None:
    engine = chat_engine()
    config = policy(sampling={"temperature": 0.8, "seed": 5, "max_new_tokens": 16})
    alone = []
    for text in ("Ada?", "Bo?"):
        with engine.session(config) as session:
            session.send(text)
            session.send("Why?")
            alone.append(session.token_ids)
    with engine.session(config) as one, engine.session(config) as two:
        one.send("Ada?")
        events = two.stream("Bo?")
        next(events)
        one.send("Why?")
        list(events)
        two.send("Why?")
        assert [one.token_ids, two.token_ids] == alone
