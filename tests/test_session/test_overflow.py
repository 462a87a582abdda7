"""Conversations that outgrow the context: refused, or shortened without splitting a call from its
result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import (
    ContextOverflowError,
    Engine,
    InputError,
    Overflow,
    Session,
    SessionBusy,
    SessionStateError,
    drop_oldest_turns,
)
from sfi_agent.session.overflow import checked_messages
from tests.test_session.async_cases import END, in_another_thread, run_async, state_of
from tests.test_session.conversations import (
    DENSE,
    SPARSE,
    call_text,
    chat_engine,
    encode,
    require_whole,
    says,
)
from tests.test_session.test_chat_interruptions import StepFailed, at_forward, fail

pytestmark = pytest.mark.timeout(120)

CONTEXT_TOKENS = 640
ROOM_TOKENS = 96
CONFIG = DENSE.replace(sampling={"max_new_tokens": ROOM_TOKENS})
Message = Mapping[str, Any]


def engine_() -> Engine:
    return chat_engine(context_tokens=CONTEXT_TOKENS)


def note(text: str) -> str:
    """Notes something.

    Args:
        text: What.
    """
    return f"noted {text}"


def orphans(messages: Sequence[Message]) -> set[str]:
    """Calls without a result and results without a call."""
    calls = [call["id"] for item in messages for call in item.get("tool_calls", ())]
    results = [item["tool_call_id"] for item in messages if item["role"] == "tool"]
    assert len(set(results)) == len(results)
    return set(calls) ^ set(results)


def fill(session: Session, turns: int) -> None:
    """Short turns, every second one with two calls."""
    for number in range(turns):
        calls = "\n".join(call_text("note", text=f"{number}{letter}") for letter in "ab")
        outputs = [f"{calls}{END}", f"Done {number}.{END}"] if number % 2 else [f"Hm.{END}"]
        with says(session.engine, *outputs):
            session.run(f"Message number {number}, with some more words.")


# ---------------------------------------------------------------- the default


def test_without_a_hook_nothing_is_ever_dropped() -> None:
    engine = engine_()
    with engine.session(CONFIG, system="Be kind.", tools=[note]) as session:
        fill(session, 2)
        before = state_of(session)
        for action in (session.send, session.run, lambda text: run_async(session.asend(text))):
            with pytest.raises(ContextOverflowError) as caught:
                action("word " * CONTEXT_TOKENS)
            assert caught.value.needed_tokens > caught.value.limit_tokens == CONTEXT_TOKENS
            assert state_of(session) == before
        require_whole(session)


@pytest.mark.parametrize("overflow", ["drop", None, 3, ["error"]])
def test_an_unknown_overflow_is_refused(overflow: Any) -> None:
    with pytest.raises(InputError, match="overflow="):
        engine_().session(CONFIG, overflow=overflow)


# ---------------------------------------------------------------- what a hook sees and does


@pytest.mark.parametrize("way", ["send", "run", "asend", "stream"])
def test_a_hook_is_asked_and_the_session_goes_on_with_its_answer(way: str) -> None:
    engine = engine_()
    asked: list[Overflow] = []

    def keep_the_last(overflow: Overflow) -> list[Message]:
        asked.append(overflow)
        return [overflow.messages[0], overflow.messages[-1]]

    def take(session: Session, text: str) -> Any:
        if way == "asend":
            return run_async(session.asend(text))
        if way == "stream":
            return list(session.stream(text))[-1].reply  # type: ignore[union-attr]
        return getattr(session, way)(text)

    with engine.session(CONFIG, system="Be kind.", tools=[note], overflow=keep_the_last) as session:
        fill(session, 2)
        assert asked == []
        before, mark = session.messages, session.mark()
        words = "word " * ((CONTEXT_TOKENS - len(session.token_ids)) // 2)
        early_mark = session.mark(5)
        with says(engine, f"Fine.{END}"):
            reply = take(session, words)
        (overflow,) = asked
        assert overflow.limit_tokens == CONTEXT_TOKENS < overflow.needed_tokens
        assert list(overflow.messages) == [*before, {"role": "user", "content": words}]
        assert overflow.tokens_needed_for(overflow.messages) >= overflow.needed_tokens - 8
        # The system message and the tools stand at the front, and stay in the history.
        assert reply.usage.reuse_lost_reason == "history_edited"
        assert reply.usage.cached_tokens > 50 and reply.text == "Fine."
        assert session.messages == [
            before[0],
            {"role": "user", "content": words},
            {"role": "assistant", "content": "Fine."},
        ]
        require_whole(session)
        with pytest.raises(SessionStateError):
            session.rewind(mark)
        session.rewind(early_mark)
        require_whole(session)


def test_a_hook_is_asked_when_the_answer_would_have_no_room() -> None:
    engine = engine_()
    asked: list[int] = []

    def look(overflow: Overflow) -> Sequence[Message]:
        asked.append(overflow.needed_tokens - overflow.limit_tokens)
        return overflow.messages

    with engine.session(CONFIG, overflow=look) as session:
        with says(engine, f"Hm.{END}"):
            session.send("word " * 220)
        assert not asked
        free = CONTEXT_TOKENS - len(session.token_ids)
        assert free > ROOM_TOKENS + 60
        # Left as it is: the prompt fits, so the turn is taken with the room that is left.
        with says(engine, "word " * free):
            reply = session.send("word " * ((free - 40) // 2))
        assert len(asked) == 1 and 0 < asked[0] < ROOM_TOKENS
        assert reply.finish_reason == "length"
        assert reply.usage.output_tokens == ROOM_TOKENS - asked[0]
        assert reply.usage.reuse_lost_reason is None
        before = state_of(session)
        with pytest.raises(ContextOverflowError):
            session.send("And more.")
        assert state_of(session) == before


def test_an_answer_longer_than_half_the_context_asks_nobody_in_vain() -> None:
    config = CONFIG.replace(sampling={"max_new_tokens": 10 * CONTEXT_TOKENS})

    def never(overflow: Overflow) -> Sequence[Message]:
        raise AssertionError

    with engine_().session(config, overflow=never) as session:
        with says(session.engine, f"Hi.{END}"):
            assert session.send("Hello.").text == "Hi."


def test_a_hook_may_look_fork_and_summarize() -> None:
    engine = engine_()
    refused: list[Any] = []

    def summarize(overflow: Overflow) -> list[Message]:
        session = overflow.session
        assert session.token_ids and session.mark()
        for action in (lambda: session.send("x"), lambda: session.decode([1]), session.close):
            refused.append(type(in_another_thread(action)))
        with session.fork() as child:
            # The fork is not asked to shorten itself: that would never end.
            with pytest.raises(ContextOverflowError):
                child.send("word " * CONTEXT_TOKENS)
            with says(engine, f"Short.{END}"):
                summary = child.send("Sum up.").text
        return [
            {"role": "user", "content": f"Before: {summary}"},
            {"role": "assistant", "content": "I see."},
            overflow.messages[-1],
        ]

    for way in ("send", "asend"):
        with engine.session(CONFIG, overflow=summarize) as session:
            with says(engine, f"Hm.{END}"):
                session.send("word " * 220)
            text = "word " * 180
            with says(engine):
                reply = session.send(text) if way == "send" else run_async(session.asend(text))
            assert reply.usage.reuse_lost_reason == "history_edited"
            assert session.messages[0]["content"] == "Before: Short."
            require_whole(session)
    assert set(refused) == {SessionBusy}


def test_a_long_result_can_be_shortened_in_the_middle_of_a_run() -> None:
    engine = engine_()

    def dump() -> str:
        """Says much."""
        return "long " * CONTEXT_TOKENS

    def cut_results(overflow: Overflow) -> list[Message]:
        # What is rendered anew comes to positions that the first script has written to.
        scripts[0].__exit__()
        scripts[1].__enter__()
        return [
            {**item, "content": item["content"][:40]} if item["role"] == "tool" else item
            for item in overflow.messages
        ]

    with engine.session(CONFIG, tools=[dump], overflow=cut_results) as session:
        scripts = [says(engine, call_text("dump") + END), says(engine, f"Much.{END}")]
        scripts[0].__enter__()
        try:
            reply = session.run("Dump.")
        finally:
            scripts[1].__exit__()
        assert reply.text == "Much."
        (result,) = [item for item in session.messages if item["role"] == "tool"]
        assert len(result["content"]) == 40 and orphans(session.messages) == set()
        require_whole(session)


BAD_ANSWERS: dict[str, tuple[Callable[[Overflow], Any], str]] = {
    "a call without its results": (
        lambda o: [o.messages[0], o.messages[-1], *calls_of(o), o.messages[-1]],
        "the call call_0 without its result",
    ),
    "a result without its call": (
        lambda o: [o.messages[0], *results_of(o), o.messages[-1]],
        "call_0",
    ),
    "one of two results": (
        lambda o: [o.messages[0], *calls_of(o), *results_of(o)[:1], o.messages[-1]],
        "call_1",
    ),
    "no system message": (lambda o: [o.messages[-1]], "no system message"),
    "nothing": (lambda o: [], "empty list"),
    "None": (lambda o: None, "a list of messages"),
    "a text": (lambda o: "user", "a list of messages"),
    "an answer at the end": (
        lambda o: [*o.messages, {"role": "assistant", "content": "x"}],
        "last",
    ),
    "another role": (lambda o: [o.messages[0], {"role": "robot", "content": "x"}], "robot"),
}


def calls_of(overflow: Overflow) -> list[Message]:
    return [item for item in overflow.messages if item.get("tool_calls")]


def results_of(overflow: Overflow) -> list[Message]:
    return [item for item in overflow.messages if item["role"] == "tool"]


@pytest.mark.parametrize(("answer", "says_"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_answers_that_split_a_pair_are_refused_by_name(
    answer: Callable[[Overflow], Any], says_: str
) -> None:
    engine = engine_()
    with engine.session(CONFIG, system="Be kind.", tools=[note], overflow=answer) as session:
        fill(session, 2)
        before = state_of(session)
        with pytest.raises(InputError, match=says_):
            session.send("word " * 180)
        assert state_of(session) == before
        with says(engine, f"Ok.{END}"):
            session.send("Short.")
        require_whole(session)


def test_what_a_hook_raises_changes_nothing() -> None:
    engine = engine_()

    def give_up(overflow: Overflow) -> Sequence[Message]:
        raise LookupError("enough")

    with engine.session(CONFIG, overflow=give_up) as session:
        with says(engine, f"Hm.{END}"):
            session.send("word " * 220)
        before = state_of(session)
        for action in (session.send, lambda text: run_async(session.asend(text))):
            with pytest.raises(LookupError, match="enough"):
                action("word " * 200)
            assert state_of(session) == before
        require_whole(session)


@pytest.mark.parametrize("stopper", ["cancel", "failure"])
def test_a_shortened_turn_that_does_not_begin_is_taken_back(stopper: str) -> None:
    engine = chat_engine(context_tokens=CONTEXT_TOKENS, prefill_chunk_tokens=64)
    with engine.session(CONFIG, overflow=drop_oldest_turns()) as session:
        with says(engine, f"Hm.{END}"):
            session.send("word " * 220)
        before = state_of(session)
        # Other words, so that nothing but the beginning can be kept of the history.
        text = "card " * (400 // len(encode(engine, "card ")))
        if stopper == "cancel":
            with at_forward(engine, 2, lambda: in_another_thread(session.cancel)):
                assert session.send(text).finish_reason == "cancelled"
        else:
            with at_forward(engine, 2, fail), pytest.raises(StepFailed):
                session.send(text)
        assert state_of(session) == before
        require_whole(session)


def test_call_numbers_stay_unique_when_old_calls_are_dropped() -> None:
    engine = engine_()
    with engine.session(CONFIG, tools=[note], overflow=drop_oldest_turns(keep_turns=2)) as session:
        seen: list[str] = []
        for number in range(8):
            with says(engine, call_text("note", text=str(number)) + END, f"Ok.{END}"):
                session.run("word " * 30)
            ids = [call["id"] for item in session.messages for call in item.get("tool_calls", ())]
            assert len(set(ids)) == len(ids) and orphans(session.messages) == set()
            seen.append(ids[-1])
        assert len(session.messages) < 4 * 8 and len(set(seen)) == 8
        require_whole(session)


# ---------------------------------------------------------------- the hook that comes with it


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns with any number of parallel calls, whose results may come late, up to a new message."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": "s"})
    if draw(st.booleans()):
        messages.append({"role": "assistant", "content": "Welcome."})
    number = 0
    for _ in range(draw(st.integers(1, 6))):
        messages.append({"role": "user", "content": "u" * draw(st.integers(1, 9))})
        for _ in range(draw(st.integers(0, 3))):
            count = draw(st.integers(1, 3))
            ids = [f"call_{number + index}" for index in range(count)]
            number += count
            calls = [
                {"id": name, "type": "function", "function": {"name": "f", "arguments": {}}}
                for name in ids
            ]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            if draw(st.integers(0, 5)) == 0:
                messages.append({"role": "user", "content": "meanwhile"})
            for name in draw(st.permutations(ids)):
                messages.append(
                    {"role": "tool", "tool_call_id": name, "content": "r" * draw(st.integers(1, 9))}
                )
        messages.append({"role": "assistant", "content": "a" * draw(st.integers(1, 9))})
    messages.append({"role": "user", "content": "new"})
    return messages


def size(messages: Sequence[Message]) -> int:
    return sum(2 + len(item["content"]) + 5 * len(item.get("tool_calls", ())) for item in messages)


@settings(deadline=None, max_examples=200)
@given(conversations(), st.integers(1, 6), st.integers(5, 120))
def test_dropping_turns_never_leaves_an_orphan(
    messages: list[dict[str, Any]], keep_turns: int, limit: int
) -> None:
    overflow = Overflow(size(messages), limit, tuple(messages), None, size)  # type: ignore[arg-type]
    kept = drop_oldest_turns(keep_turns=keep_turns)(overflow)
    assert orphans(kept) == set()
    assert list(checked_messages(kept, messages)) == list(kept)
    head = messages[:1] if messages[0]["role"] == "system" else []
    assert list(kept[: len(head)]) == head
    rest = list(kept[len(head) :])
    # A tail of the conversation, cut before a user message unless nothing was dropped.
    assert rest == messages[len(messages) - len(rest) :]
    whole = len(rest) == len(messages) - len(head)
    assert whole or rest[0]["role"] == "user"
    turns = sum(item["role"] == "user" and item["content"] != "meanwhile" for item in rest)
    assert turns <= keep_turns or whole
    if size(kept) > limit:
        # Only the newest turn is left where nothing else fits.
        later = [index for index, item in enumerate(rest) if index and item["role"] == "user"]
        assert all(orphans(rest[index:]) for index in later)


@settings(deadline=None, max_examples=200)
@given(conversations(), st.data())
def test_whatever_a_hook_leaves_out_no_pair_is_split(
    messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(messages), max_size=len(messages)))
    given_back = [item for item, keep in zip(messages, mask, strict=True) if keep]
    try:
        kept = checked_messages(given_back, messages)
    except InputError as error:
        split = orphans(given_back)
        system_lost = messages[0]["role"] == "system" and not mask[0]
        bad_end = not given_back or given_back[-1]["role"] not in ("user", "tool")
        assert split or system_lost or bad_end, error
        if split and not (system_lost or bad_end):
            assert any(name in str(error) for name in split)
    else:
        assert orphans(kept) == set()


@pytest.mark.parametrize("keep_turns", [0, -1, True, 1.5, None])
def test_an_unusable_number_of_turns_is_refused(keep_turns: Any) -> None:
    with pytest.raises(InputError, match="keep_turns"):
        drop_oldest_turns(keep_turns=keep_turns)


@pytest.mark.parametrize("config", [CONFIG, SPARSE.replace(sampling={"max_new_tokens": 96})])
def test_a_conversation_without_end(config: Any) -> None:
    """Far more than the context holds, through tools, runs and the event loop."""
    engine = engine_()
    hook = drop_oldest_turns(keep_turns=3)
    lost = 0
    with engine.session(config, system="Be kind.", tools=[note], overflow=hook) as session:
        for number in range(12):
            calls = "\n".join(call_text("note", text=f"{number}{letter}") for letter in "ab")
            with says(engine, f"{calls}{END}", f"Done {number}.{END}"):
                text = f"Message number {number}. " + "word " * 20
                if number % 2:
                    reply = session.run(text)
                else:
                    reply = asyncio.run(session.arun(text))
            assert reply.text == f"Done {number}."
            lost += reply.usage.reuse_lost_reason == "history_edited"
            assert session.messages[0] == {"role": "system", "content": "Be kind."}
            assert orphans(session.messages) == set()
            assert len(session.token_ids) <= CONTEXT_TOKENS
        assert lost >= 3
        require_whole(session, exact=config is CONFIG)
    with engine.session(config, overflow=hook) as session:
        with pytest.raises(ContextOverflowError):
            session.send("word " * CONTEXT_TOKENS)
        assert session.token_ids == []
