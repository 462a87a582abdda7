"""The asynchronous twins: the same conversations, one owner, and ends of every kind."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sfi_agent import (
    ContextOverflowError,
    Engine,
    InputError,
    Session,
    SessionBusy,
    SessionConfig,
    SessionStateError,
    Step,
    TemplateError,
    ToolResult,
    ToolStart,
    TurnEnd,
)
from tests.test_session.async_cases import (
    END,
    TOOLS,
    awork,
    collected,
    eventually,
    in_another_thread,
    no_faster_than,
    no_new_threads,
    run_async,
    state_of,
    timeless,
    work,
)
from tests.test_session.conversations import (
    DENSE,
    FULL,
    SPARSE,
    call_text,
    chat_engine,
    policy,
    require_whole,
    says,
)
from tests.test_session.test_chat_interruptions import (
    CHUNK_TOKENS,
    LONG,
    StepFailed,
    at_forward,
    fail,
    require_usable,
)

pytestmark = pytest.mark.timeout(120)

POLICIES = pytest.mark.parametrize("config", [DENSE, FULL, SPARSE], ids=["dense", "full", "sparse"])
CALLS = f"{call_text('work', task='a')}\n{call_text('awork', task='b')}{END}"


# ---------------------------------------------------------------- the same as the sync calls


@POLICIES
def test_the_twins_say_what_the_sync_calls_say(config: SessionConfig) -> None:
    engine = chat_engine()
    script = (f"Hello.{END}", CALLS, f"Done.{END}", CALLS, f"Fine.{END}")

    def in_this_thread(session: Session) -> list[Any]:
        return [session.send("Hi."), session.run("Work."), list(session.stream("Again."))]

    async def in_a_loop(session: Session) -> list[Any]:
        return [
            await session.asend("Hi."),
            await session.arun("Work."),
            await collected(session.astream("Again.")),
        ]

    with engine.session(config, tools=TOOLS) as one, engine.session(config, tools=TOOLS) as other:
        with says(engine, *script):
            *replies, events = in_this_thread(one)
        with says(engine, *script):
            *async_replies, async_events = run_async(in_a_loop(other))
        assert [timeless(reply) for reply in replies] == [timeless(item) for item in async_replies]
        # Tools run side by side: who begins and who is done first is no property of the call.
        for found in (events, async_events):
            found.sort(key=lambda event: isinstance(event, ToolResult) and event.call_id or "")
        assert [timeless(event) for event in events] == [timeless(item) for item in async_events]
        assert state_of(one) == state_of(other)
        require_whole(other, exact=config is not SPARSE)


def test_nothing_happens_before_the_first_event_is_asked_for() -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        never_read = session.astream("Hi.")
        with says(engine, f"Hello.{END}"):
            await session.asend("Hi.")
        await never_read.aclose()
        await never_read.aclose()
        assert [event async for event in never_read] == []

    with engine.session(FULL) as session:
        run_async(body(session))
        assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_tools_run_where_they_can_use_what_is_the_callers() -> None:
    """Async tools in the caller's loop, or in one loop for all of a run; sync ones in threads."""
    engine = chat_engine()
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen: list[tuple[str, str, Any]] = []

    async def awaits(task: str) -> str:
        """Waits.

        Args:
            task: For what.
        """
        seen.append(("async", who.get(), asyncio.get_running_loop()))
        return task

    def works(task: str) -> str:
        """Works.

        Args:
            task: At what.
        """
        seen.append(("sync", who.get(), threading.current_thread()))
        return task

    turn = f"{call_text('awaits', task='x')}\n{call_text('works', task='y')}{END}"
    script = (turn, turn, f"Done.{END}")

    async def body(session: Session) -> asyncio.AbstractEventLoop:
        who.set("ada")
        await session.arun("Work.")
        return asyncio.get_running_loop()

    with engine.session(FULL, tools=[awaits, works]) as session:
        with says(engine, *script):
            loop = run_async(body(session))
        assert [place for kind, _, place in seen if kind == "async"] == [loop, loop]
        assert {name for _, name, _ in seen} == {"ada"}
        threads = [place for kind, _, place in seen if kind == "sync"]
        names = {thread.name for thread in (threading.current_thread(), *threads)}
        assert len(threads) == 2 and "sfi-agent-engine" not in names and len(names) > 1
        seen.clear()
        with says(engine, *script), no_new_threads(engine):
            contextvars.copy_context().run(lambda: (who.set("bo"), session.run("Work.")))
        loops = [place for kind, _, place in seen if kind == "async"]
        assert loops[0] is loops[1] and loops[0] is not loop
        assert {name for _, name, _ in seen} == {"bo"}
        assert threading.current_thread() not in [place for _, _, place in seen]


# ---------------------------------------------------------------- refusals and failures


def test_bad_input_is_refused_before_anything_happens() -> None:
    engine = chat_engine(context_tokens=96)

    async def body(session: Session) -> None:
        wrong: list[tuple[type[Exception], Callable[[], Awaitable[Any]]]] = [
            (InputError, lambda: session.asend({"role": "robot", "content": "x"})),
            (InputError, lambda: session.asend("Hi.", timeout_seconds=0)),
            (InputError, lambda: session.arun("Hi.", max_turns=0)),
            (InputError, lambda: session.arun("Hi.", approve="yes")),  # type: ignore[arg-type]
            (ContextOverflowError, lambda: session.asend("word " * 200)),
            (ContextOverflowError, lambda: collected(session.astream("word " * 200))),
        ]
        for kind, action in wrong:
            with pytest.raises(kind):
                await action()
            assert (session.token_ids, session.messages) == ([], [])
        for seconds in (-1.0, True, "5", float("nan")):
            with pytest.raises(InputError, match="timeout_seconds"):
                session.astream("Hi.", timeout_seconds=seconds)  # type: ignore[arg-type]
        with says(engine, f"Hello.{END}"):
            assert (await session.asend("Hi.")).text == "Hello."

    with engine.session(FULL) as session:
        run_async(body(session))
        require_whole(session)
    with chat_engine(None).session(FULL) as session:
        with pytest.raises(TemplateError, match="session.asend"):
            run_async(session.asend("Hi."))
    with pytest.raises(SessionStateError, match="closed"):
        run_async(session.asend("Hi."))


@pytest.mark.parametrize("number", [1, 2, 6])
@pytest.mark.parametrize("way", ["asend", "astream", "stream", "thread"])
def test_an_exception_in_the_generating_thread_reaches_the_reader_at_once(
    way: str, number: int
) -> None:
    """With its traceback, however the session is read; the session stays usable."""
    engine = chat_engine()
    raised_at: list[float] = []

    def raising() -> None:
        raised_at.append(time.monotonic())
        fail()

    def read(session: Session) -> None:
        if way == "asend":
            run_async(session.asend("Count."))
        elif way == "astream":
            run_async(collected(session.astream("Count.")))
        else:
            list(session.stream("Count."))

    with engine.session(FULL) as session:
        with says(engine, LONG), at_forward(engine, number, raising):
            if way == "thread":
                error = in_another_thread(lambda: read(session))
            else:
                with pytest.raises(StepFailed) as caught:
                    read(session)
                error = caught.value
        assert isinstance(error, StepFailed)
        # Not when something else is over.
        assert time.monotonic() - raised_at[0] < 10
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert {"raising", "fail"} <= set(frames)
        assert len(session.trace) == number - 1
        require_usable(session, exact=True)


# ---------------------------------------------------------------- one owner at a time


def second_calls(session: Session) -> dict[str, Callable[[], Any]]:
    """Everything that needs the session for itself."""
    return {
        "send": lambda: session.send("x"),
        "run": lambda: session.run("x"),
        "stream": lambda: next(iter(session.stream("x"))),
        "asend": lambda: asyncio.run(session.asend("x")),
        "arun": lambda: asyncio.run(session.arun("x")),
        "astream": lambda: asyncio.run(collected(session.astream("x"))),
        "decode": lambda: session.decode([1]),
        "follow": lambda: session.follow([1]),
        "mark": lambda: session.mark(),
        "fork": lambda: session.fork(),
        "next_logits": lambda: session.next_logits(),
        "rewind": lambda: session.rewind(MARKS[session]),
    }


MARKS: dict[Session, Any] = {}


@pytest.mark.parametrize("holder", ["send", "run", "stream", "asend", "arun", "astream", "decode"])
def test_a_second_caller_is_refused_whatever_the_two_are(holder: str) -> None:
    engine = chat_engine()
    refused: dict[str, Any] = {}
    done: list[bool] = []

    def intrude() -> None:
        # In the middle of a step of the first call.
        for name, action in second_calls(session).items():
            refused[name] = in_another_thread(action)
        if holder != "astream" and holder != "stream":
            refused["close"] = in_another_thread(session.close)
        done.append(bool(session.token_ids and session.messages))

    def first_call() -> None:
        if holder == "decode":
            session.decode([], max_new_tokens=6)
        elif holder in ("send", "run"):
            getattr(session, holder)("Count.")
        elif holder == "stream":
            list(session.stream("Count."))
        elif holder == "astream":
            run_async(collected(session.astream("Count.")))
        else:
            run_async(getattr(session, holder)("Count."))

    with engine.session(FULL) as session:
        MARKS[session] = session.mark()
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        with says(engine, LONG), at_forward(engine, 3, intrude):
            first_call()
        assert done == [True]
        assert {name: type(error) for name, error in refused.items()} == dict.fromkeys(
            refused, SessionBusy
        )
        assert all(f"session.{holder}() still under way" in str(e) for e in refused.values())
        del MARKS[session]
        require_whole(session)


def test_two_streams_of_one_session() -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        with says(engine, LONG):
            first, second = session.astream("Count."), session.astream("Me, too.")
            await anext(first)
            with pytest.raises(SessionBusy, match=r"session.astream\(\) still under way"):
                await anext(second)
            with pytest.raises(SessionBusy):
                session.send("And me.")
            rest = await collected(first)
        assert isinstance(rest[-1], TurnEnd) and rest[-1].reply.finish_reason == "stop"
        # What was refused is over.
        assert await collected(second) == []

    with engine.session(FULL) as session:
        run_async(body(session))
        require_usable(session, exact=True)


def test_a_stream_is_read_by_one_task() -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        events = session.astream("Count.")
        with says(engine, LONG):
            reading = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            with pytest.raises(SessionBusy, match="another task"):
                await anext(events)
            await reading
            await collected(events)

    with engine.session(FULL) as session:
        run_async(body(session))
        require_whole(session)


# ---------------------------------------------------------------- cancelling


@POLICIES
@pytest.mark.parametrize("number", [1, 2, 7])
def test_cancel_during_a_step(config: SessionConfig, number: int) -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        stop = lambda: in_another_thread(session.cancel)  # noqa: E731
        with says(engine, LONG), at_forward(engine, number, stop):
            reply = await session.asend("Count.")
        assert (reply.finish_reason, reply.cancelled_by) == ("cancelled", "caller")
        assert reply.usage.output_tokens == number

    with engine.session(config) as session:
        run_async(body(session))
        require_usable(session, exact=config is not SPARSE)


@pytest.mark.parametrize("way", ["cancel", "task", "close", "timeout", "failure"])
def test_a_prefill_that_does_not_finish_takes_the_message_back(way: str) -> None:
    engine = chat_engine(prefill_chunk_tokens=CHUNK_TOKENS)
    message = "A message of many tokens, so that there are several chunks in the prefill."

    async def body(session: Session) -> None:
        loop, events = asyncio.get_running_loop(), session.astream(message, timeout_seconds=60)
        task = asyncio.ensure_future(collected(events))

        def stop() -> None:
            if way == "cancel":
                session.cancel()
            elif way == "failure":
                fail()
            elif way == "timeout":
                session._cancelled._deadline = time.monotonic()
            else:
                told = threading.Event()

                def leave() -> None:
                    if way == "task":
                        task.cancel()
                    else:
                        events._leave()
                    told.set()

                loop.call_soon_threadsafe(leave)
                told.wait(timeout=20)

        with at_forward(engine, 2, stop):
            if way == "failure":
                with pytest.raises(StepFailed):
                    await task
            elif way == "task":
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                found = await task
                if way == "close":
                    assert found == []
                else:
                    (end,) = found
                    assert isinstance(end, TurnEnd)
                    by = "timeout" if way == "timeout" else "caller"
                    assert (end.reply.finish_reason, end.reply.cancelled_by) == ("cancelled", by)
        await events.aclose()

    with engine.session(FULL, system="Be kind.") as session:
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        before = state_of(session)
        run_async(body(session))
        assert state_of(session) == before
        require_usable(session, exact=True)


def left_by_its_reader(session: Session) -> bool:
    lease = session._owner._lease
    return lease is None or lease.leaving


@pytest.mark.parametrize("config", [FULL, policy(slow_step="rectify"), policy(slow_step="verify")])
@pytest.mark.parametrize("kind", ["arun", "astream"])
def test_cancelling_the_task_cancels_the_turn(config: SessionConfig, kind: str) -> None:
    """What was generated is the session's, and the session is at rest when the task is over."""
    engine = chat_engine()

    async def body(session: Session) -> int:
        call = getattr(session, kind)("Talk.")
        task = asyncio.ensure_future(collected(call) if kind == "astream" else call)
        with no_faster_than(engine, lambda: left_by_its_reader(session), first=6):
            await eventually(lambda: len(session.trace) >= 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        generated = len(session.trace)
        session._owner.take("test").release()
        await asyncio.sleep(0.01)
        assert len(session.trace) == generated
        return generated

    with engine.session(config) as session:
        generated = run_async(body(session))
        assert generated >= 5 and session.messages[-1]["role"] == "assistant"
        # Under rectify the open segment was dropped, and its tokens wait to be processed again.
        waiting = len(session.token_ids) - session.stats.history_tokens
        assert waiting in ({0, 1} if config.slow_step != "rectify" else set(range(8)))
        require_whole(session)
        for number in range(2):
            before = session.token_ids
            session.send(f"Question {number}?")
            assert session.token_ids[: len(before)] == before
            require_whole(session)


def test_wait_for_ends_a_turn_in_time() -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        with no_faster_than(engine, lambda: left_by_its_reader(session), first=5):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.asend("Talk."), 0.05)
        with says(engine, f"Fine.{END}"):
            assert (await session.asend("Well?")).text == "Fine."

    with engine.session(DENSE.replace(sampling={"max_new_tokens": 1024})) as session:
        run_async(body(session))
        require_whole(session)


@pytest.mark.parametrize("kind", ["send", "run", "stream", "asend", "arun", "astream"])
def test_time_that_is_over_ends_a_turn_like_a_cancellation(kind: str) -> None:
    engine = chat_engine()
    with engine.session(DENSE.replace(sampling={"max_new_tokens": 1500})) as session:
        started = time.monotonic()
        with no_faster_than(engine, session._cancelled.is_set, first=5):
            result: Any = getattr(session, kind)("Talk.", timeout_seconds=0.1)
            if kind.startswith("a"):
                result = run_async(collected(result) if kind == "astream" else result)
            if kind.endswith("stream"):
                result = list(result)[-1].reply
        assert time.monotonic() - started >= 0.1
        assert (result.finish_reason, result.cancelled_by) == ("cancelled", "timeout")
        # Nothing where the machine took all of the time for the prompt.
        assert result.usage.output_tokens < 10
        # The next call has its own time.
        require_usable(session, exact=True)


def test_a_call_that_ends_in_time_says_nothing_of_it() -> None:
    engine = chat_engine()
    with engine.session(FULL) as session:
        for seconds in (60, 60.0, float("inf"), None):
            with says(engine, f"Hello.{END}"):
                reply = session.send("Hi.", timeout_seconds=seconds)
            assert (reply.finish_reason, reply.cancelled_by) == ("stop", None)


# ---------------------------------------------------------------- closing


def test_close_ends_a_stream_that_is_under_way() -> None:
    engine = chat_engine()

    async def body() -> None:
        session = engine.session(FULL)
        read = []
        with says(engine, LONG):
            async for event in session.astream("Count."):
                read.append(event)
                if len(read) == 6:
                    session.close()
        assert len(read) == 6 and session.status == "closed"
        session.close()

    run_async(body())


def test_close_ends_a_stream_that_another_task_reads() -> None:
    engine = chat_engine()

    async def body() -> None:
        session = engine.session(DENSE.replace(sampling={"max_new_tokens": 1500}))
        reading = asyncio.ensure_future(collected(session.astream("Talk.")))
        await eventually(lambda: len(session.trace) > 3)
        session.close()
        events = await reading
        assert events and not any(isinstance(event, TurnEnd) for event in events)
        with pytest.raises(SessionStateError):
            await session.asend("More.")

    run_async(body())


def test_a_session_is_not_closed_from_within_its_own_step() -> None:
    engine = chat_engine()
    errors: list[Exception] = []

    def close() -> None:
        try:
            session.close()
        except SessionBusy as error:
            errors.append(error)

    with engine.session(FULL) as session:
        with says(engine, LONG), at_forward(engine, 3, close):
            run_async(collected(session.astream("Count.")))
        assert len(errors) == 1
        require_whole(session)


def own_engine() -> Engine:
    """An engine that a test may close; its weights are those of the shared one."""
    shared = chat_engine()
    return Engine(shared.model, shared.tokenizer)


def test_a_closed_engine_ends_its_thread_and_what_runs_on_it() -> None:
    with own_engine() as engine:
        config = DENSE.replace(sampling={"max_new_tokens": 1500})
        session, quiet = engine.session(config), engine.session(FULL)

        async def body() -> None:
            task = asyncio.ensure_future(session.asend("Talk."))
            with no_faster_than(engine, lambda: engine.thread._closed, first=6):
                await eventually(lambda: len(session.trace) > 3)
                engine.close()
            with pytest.raises(SessionStateError, match="closed engine"):
                await task
            for refused in (session.asend("More."), quiet.arun("More.")):
                with pytest.raises(SessionStateError, match="closed"):
                    await refused

        run_async(body())
        engine.close()
        assert engine.thread._thread is not None and not engine.thread._thread.is_alive()
        with pytest.raises(SessionStateError, match="closed"):
            engine.session(FULL)
        # What is open goes on in its own thread.
        assert len(session.messages) == 2 and len(session.decode([], max_new_tokens=2)) == 2
        require_whole_history(session)
        session.close()
        quiet.close()
    engine.close()


def require_whole_history(session: Session) -> None:
    assert len(session.token_ids) - session.stats.history_tokens == 1


def test_an_engine_without_asynchronous_calls_has_no_thread() -> None:
    before = threading.active_count()
    with own_engine() as engine, engine.session(FULL) as session:
        with says(engine, f"Hello.{END}"):
            session.send("Hi.")
        assert threading.active_count() == before
    engine.close()


def test_streams_have_a_start_and_a_result_for_every_tool() -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        with says(engine, CALLS, f"Done.{END}"):
            events = await collected(session.astream("Work."))
        started = [event.call.id for event in events if isinstance(event, ToolStart)]
        results = {event.call_id for event in events if isinstance(event, ToolResult)}
        assert started == ["call_0", "call_1"] and results == set(started)
        tokens = sum(isinstance(event, Step) for event in events)
        ends = [event.reply for event in events if isinstance(event, TurnEnd)]
        assert tokens == sum(reply.usage.output_tokens for reply in ends)

    with engine.session(FULL, tools=[work, awork]) as session:
        run_async(body(session))
        require_whole(session)
