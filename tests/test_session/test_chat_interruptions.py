"""Cancelled, abandoned and failed turns leave a session that goes on as if it had been planned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sfi_agent import (
    Engine,
    Session,
    SessionBusy,
    SessionConfig,
    SessionStateError,
    Step,
    Tool,
    ToolStart,
    TurnEnd,
)
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
LONG = "One two three. Four five six. Seven eight nine. Ten." + END
CHUNK_TOKENS = 7


class StepFailed(Exception):
    """What the tests let the model raise."""


def in_another_thread(action: Callable[[], Any]) -> Any:
    """Run something in a thread of its own; what it raises is returned."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=20)
    assert results, "the thread hangs"
    return results[0]


@contextmanager
def at_forward(engine: Engine, number: int, action: Callable[[], Any]) -> Iterator[None]:
    """Do something in the middle of the model's n-th forward pass, counted from 1."""
    passes = 0

    def hook(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == number:
            action()

    layers = engine.model.get_decoder().layers
    handle = layers[len(layers) // 2].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fail() -> None:
    raise StepFailed


def require_usable(session: Session, *, exact: bool) -> None:
    """The next turns run and fit what is there."""
    require_whole(session, exact=exact)
    for number in range(2):
        before = session.token_ids
        with says(session.engine, f"Answer {number}.{END}"):
            reply = session.send(f"Question {number}?")
        assert (reply.text, reply.finish_reason) == (f"Answer {number}.", "stop")
        assert session.token_ids[: len(before)] == before
        require_whole(session, exact=exact)


POLICIES = pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])


# ---------------------------------------------------------------- cancelling


@POLICIES
def test_cancel_between_tokens(config: SessionConfig) -> None:
    engine = chat_engine()
    with engine.session(config) as session:
        with says(engine, LONG):
            steps = 0
            for event in session.stream("Count."):
                steps += isinstance(event, Step)
                if steps == 5:
                    in_another_thread(session.cancel)
        assert isinstance(event, TurnEnd)
        reply = event.reply
        assert (reply.finish_reason, reply.usage.output_tokens) == ("cancelled", 5)
        assert session.messages[-1] == {"role": "assistant", "content": reply.text}
        require_usable(session, exact=config is not SPARSE)


@POLICIES
def test_cancel_during_a_step(config: SessionConfig) -> None:
    engine = chat_engine()
    with engine.session(config) as session:
        with says(engine, LONG), at_forward(engine, 4, lambda: in_another_thread(session.cancel)):
            reply = session.send("Count.")
        assert (reply.finish_reason, reply.usage.output_tokens) == ("cancelled", 4)
        require_usable(session, exact=config is not SPARSE)


def test_cancel_in_the_first_prefill_takes_the_message_back() -> None:
    engine = chat_engine(prefill_chunk_tokens=CHUNK_TOKENS)
    with engine.session(FULL, system="Be kind.") as session:
        untouched = session.messages
        with at_forward(engine, 2, lambda: in_another_thread(session.cancel)):
            reply = session.send("A message of many tokens, so that there are several chunks.")
        assert (reply.finish_reason, reply.text, reply.steps) == ("cancelled", "", ())
        assert reply.usage.cached_tokens + reply.usage.prefilled_tokens == reply.usage.prompt_tokens
        assert (session.token_ids, session.messages) == ([], untouched)
        require_usable(session, exact=True)


@pytest.mark.parametrize("stopper", ["cancel", "failure"])
@pytest.mark.parametrize("template", ["CHATML", "CHANGES_THE_CLOSE"])
def test_a_prefill_that_does_not_finish_takes_the_message_back(template: str, stopper: str) -> None:
    engine = chat_engine(template, prefill_chunk_tokens=CHUNK_TOKENS)
    letters = [token for letter in "She is there." for token in encode(engine, letter)]
    with engine.session(FULL) as session, engine.session(FULL) as undisturbed:
        for item in (session, undisturbed):
            # Letter by letter: where history is rendered again, the new ids are others.
            with says(engine, [*letters, *encode(engine, END)]):
                item.send("Where is Ada?")
        mark = session.mark(10)
        late_mark = session.mark()
        state = (session.token_ids, session.messages, [step.position for step in session.trace])
        message = "A message of many tokens, so that there are several chunks in the prefill."
        if stopper == "cancel":
            with at_forward(engine, 2, lambda: in_another_thread(session.cancel)):
                assert session.send(message).finish_reason == "cancelled"
        else:
            with at_forward(engine, 2, fail), pytest.raises(StepFailed):
                session.send(message)
        assert state == (
            session.token_ids,
            session.messages,
            [step.position for step in session.trace],
        )
        require_whole(session)
        for item in (session, undisturbed):
            with says(engine, f"Again.{END}"):
                item.send(message)
            require_whole(item)
        assert session.token_ids == undisturbed.token_ids
        assert session.messages == undisturbed.messages
        if template == "CHATML":
            session.rewind(late_mark)
            assert (session.token_ids, session.messages) == state[:2]
        session.rewind(mark)
        assert session.token_ids == state[0][:10]
        require_whole(session)


def test_cancel_in_a_tool_runs_no_further_tool_and_keeps_what_ran() -> None:
    engine = chat_engine()
    ran: list[str] = []
    sessions: list[Session] = []
    over = threading.Event()

    def work(task: str) -> str:
        """Works.

        Args:
            task: What to do.
        """
        ran.append(task)
        if task == "second":
            in_another_thread(sessions[0].cancel)
            over.wait(timeout=20)
        return f"done with {task}"

    calls = [call_text("work", task=task) for task in ("first", "second", "third")]
    with engine.session(FULL, tools=[Tool(work, parallel=False)]) as session:
        sessions.append(session)
        with says(engine, "\n".join(calls) + END):
            reply = session.run("Work.")
        over.set()
        assert ran == ["first", "second"]
        assert (reply.finish_reason, reply.cancelled_by) == ("cancelled", "caller")
        assert [call.arguments["task"] for call in reply.tool_calls] == ["first", "second", "third"]
        require_whole(session)
        with says(engine, f"Fine.{END}"):
            session.send("What is done?")
        answers = [item["content"] for item in session.messages if item["role"] == "tool"]
        assert answers[0] == "done with first"
        # The second had not returned when it was cancelled: what it says then is dropped.
        assert "cancelled before it finished" in answers[1] and "not run" in answers[2]
        require_usable(session, exact=True)


def test_a_cancel_of_the_past_does_not_end_the_next_turn() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        session.cancel()
        require_usable(session, exact=True)


# ---------------------------------------------------------------- abandoning


@POLICIES
@pytest.mark.parametrize("taken", [1, 2, 9])
def test_a_stream_closed_early_keeps_what_was_generated(config: SessionConfig, taken: int) -> None:
    engine = chat_engine()
    with engine.session(config) as session:
        with says(engine, LONG):
            events = session.stream("Count.")
            steps = [event for event in (next(events) for _ in range(taken)) if _is_step(event)]
            events.close()  # type: ignore[attr-defined]
        assert len(session.trace) == len(steps) > 0
        assert session.messages[-1]["role"] == "assistant"
        require_usable(session, exact=config is not SPARSE)


def _is_step(event: object) -> bool:
    return isinstance(event, Step)


def test_a_stream_that_nobody_holds_ends_by_itself() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        with says(engine, LONG):
            for _ in session.stream("Count."):
                break
        require_usable(session, exact=True)


def test_a_stream_closed_between_tools_keeps_their_results() -> None:
    engine = chat_engine()
    released = threading.Event()

    def double(number: int) -> int:
        """Doubles a number.

        Args:
            number: The number.
        """
        if number > 1:
            released.wait(timeout=20)
        return 2 * number

    calls = "\n".join(call_text("double", number=number) for number in (1, 2, 3))
    with engine.session(FULL, tools=[Tool(double, parallel=False)]) as session:
        with says(engine, calls + END):
            for event in session.stream("Double."):
                if isinstance(event, ToolStart) and event.call.arguments["number"] == 2:
                    break
            del event
        released.set()
        with says(engine, f"Fine.{END}"):
            session.send("Well?")
        answers = [item["content"] for item in session.messages if item["role"] == "tool"]
        assert answers[0] == "2"
        assert "cancelled before it finished" in answers[1] and "not run" in answers[2]
        require_whole(session)


def test_leaving_the_with_block_ends_a_stream_and_gives_the_model_back() -> None:
    engine = chat_engine()
    before = engine.model.config._attn_implementation
    with pytest.raises(StepFailed):
        with engine.session(FULL) as session:
            with says(engine, LONG):
                events = session.stream("Count.")
                for _ in events:
                    fail()
    assert session.status == "closed"
    assert engine.model.config._attn_implementation == before
    with pytest.raises(StopIteration):
        next(events)


# ---------------------------------------------------------------- failing steps


@POLICIES
@pytest.mark.parametrize("number", [2, 3, 8])
def test_a_failed_step_keeps_what_was_generated_before_it(
    config: SessionConfig, number: int
) -> None:
    engine = chat_engine()
    with engine.session(config) as session:
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        before = len(session.trace)
        with says(engine, LONG), at_forward(engine, number, fail), pytest.raises(StepFailed):
            session.send("Count.")
        assert len(session.trace) - before == number - 1
        assert session.messages[-1]["role"] == "assistant"
        require_usable(session, exact=config is not SPARSE)


@POLICIES
def test_a_failed_step_of_decode_keeps_its_ids(config: SessionConfig) -> None:
    engine = chat_engine()
    with engine.session(config) as session:
        with at_forward(engine, 5, fail), pytest.raises(StepFailed):
            session.decode([10, 20, 30], max_new_tokens=12)
        assert len(session.token_ids) == 3 + 4
        require_whole(session, exact=config is not SPARSE)
        assert len(session.decode([], max_new_tokens=6)) == 6
        with at_forward(engine, 1, fail), pytest.raises(StepFailed):
            session.decode([40, 50], max_new_tokens=6)
        assert session.token_ids[-2:] == [40, 50]
        assert len(session.decode([], max_new_tokens=6)) == 6
        require_whole(session, exact=config is not SPARSE)


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("part", ["selector", "_sampler"])
def test_what_fails_behind_a_step_leaves_the_last_id_pending(part: str, number: int) -> None:
    engine = chat_engine()
    with engine.session(FULL) as session, engine.session(FULL) as undisturbed:
        decoder: Any = session._core._decoder
        owner = decoder if part == "_sampler" else decoder.steps
        whole = getattr(owner, part)
        setattr(owner, part, FailsAt(whole, number))
        with pytest.raises(StepFailed):
            session.decode([10, 20, 30], max_new_tokens=30)
        setattr(owner, part, whole)
        require_whole(session)
        session.decode([], max_new_tokens=33 - len(session.token_ids))
        undisturbed.decode([10, 20, 30], max_new_tokens=30)
        assert session.token_ids == undisturbed.token_ids
        require_whole(session)


class FailsAt:
    """Stands before a selector or sampler and fails at its n-th use, counted from 1."""

    def __init__(self, inner: Any, number: int) -> None:
        self.inner = inner
        self.number = number

    def __getattr__(self, name: str) -> Any:
        if name in ("select", "choose"):
            self.number -= 1
            if not self.number:
                raise StepFailed
        return getattr(self.inner, name)


# ---------------------------------------------------------------- one owner at a time


def test_a_running_stream_owns_the_session() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        actions: list[Callable[[], Any]] = [
            lambda: session.send("x"),
            lambda: session.run("x"),
            lambda: next(iter(session.stream("x"))),
            lambda: session.decode([1]),
            lambda: session.mark(),
            lambda: session.fork(),
            lambda: session.next_logits(),
        ]
        with says(engine, LONG):
            events = session.stream("Count.")
            next(events)
            for action in actions:
                with pytest.raises(SessionBusy, match=r"session.stream\(\) still under way"):
                    action()
                assert isinstance(in_another_thread(action), SessionBusy)
            # Looking is always allowed.
            assert session.token_ids and session.messages and session.trace
            assert session.stats.generated_tokens == 1 and "open" in repr(session)
            reply = [event for event in events if isinstance(event, TurnEnd)][0].reply
        assert reply.finish_reason == "stop"
        require_usable(session, exact=True)


def test_a_second_thread_is_refused_while_a_step_runs() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        errors: list[Any] = []

        def intrude() -> None:
            errors.append(in_another_thread(lambda: session.send("me, too")))
            errors.append(in_another_thread(session.close))

        with says(engine, LONG), at_forward(engine, 3, intrude):
            reply = session.send("Count.")
        assert [type(error) for error in errors] == [SessionBusy, SessionBusy]
        assert reply.finish_reason == "stop"
        require_usable(session, exact=True)


def test_a_closed_session_says_so() -> None:
    engine = chat_engine()
    session = engine.session(FULL)
    states = [session.status]
    with says(engine, f"Hi.{END}"):
        session.send("Hello.")
    mark = session.mark()
    states.append(session.status)
    session.close()
    session.close()
    states.append(session.status)
    assert states == ["new", "open", "closed"] and session.token_ids == []
    for action in (
        lambda: session.send("x"),
        lambda: next(iter(session.stream("x"))),
        lambda: session.decode([1]),
        lambda: session.next_logits(),
        lambda: session.mark(),
        lambda: session.rewind(mark),
        lambda: session.fork(),
        lambda: session.__enter__(),
    ):
        with pytest.raises(SessionStateError, match="closed"):
            action()
