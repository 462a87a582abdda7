"""Readers that disappear: the turn ends, the session is free, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from sfi_agent import Session, ToolStart
from sfi_agent.session.asynchronous.worker_loop import WorkerLoop
from tests.test_session.async_cases import (
    END,
    collected,
    eventually,
    no_faster_than,
    no_new_threads,
    run_async,
    until,
)
from tests.test_session.conversations import DENSE, FULL, call_text, chat_engine, says
from tests.test_session.test_chat_interruptions import require_usable

pytestmark = pytest.mark.timeout(120)

TALKS = DENSE.replace(sampling={"max_new_tokens": 1000})
Body = Callable[[Session], Coroutine[Any, Any, None]]


async def read_some(session: Session, events: Any = None, count: int = 5) -> Any:
    stream = events or session.astream("Talk.")
    for _ in range(count):
        await anext(stream)
    return stream


def left_by_its_reader(session: Session) -> Callable[[], bool]:
    """Asks whether nobody reads any more; keeps the session from nothing."""
    owner = session._owner
    return lambda: owner._lease is None or owner._lease.leaving


async def cancelled_in_a_read(session: Session) -> None:
    task = asyncio.ensure_future(collected(session.astream("Talk.")))
    await eventually(lambda: len(session.trace) > 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def cancelled_between_reads(session: Session) -> None:
    async def read() -> None:
        async for _ in session.astream("Talk."):
            await asyncio.sleep(30)

    task = asyncio.ensure_future(read())
    await eventually(lambda: len(session.trace) > 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def left_by_a_break(session: Session) -> None:
    async for _ in session.astream("Talk."):
        break


async def left_by_an_exception(session: Session) -> None:
    try:
        async for _ in session.astream("Talk."):
            raise LookupError
    except LookupError:
        pass


async def dropped(session: Session) -> None:
    await read_some(session)


async def dropped_in_a_cycle(session: Session) -> None:
    cycle: list[Any] = [await read_some(session)]
    cycle.append(cycle)
    del cycle
    gc.collect()


async def closed(session: Session) -> None:
    await (await read_some(session)).aclose()


async def still_read_when_the_loop_ends(session: Session) -> None:
    # Left to `asyncio.run`, which cancels what still runs.
    KEPT.append(asyncio.ensure_future(collected(session.astream("Talk."))))
    await eventually(lambda: len(session.trace) > 3)


async def asend_still_waited_for_when_the_loop_ends(session: Session) -> None:
    KEPT.append(asyncio.ensure_future(session.asend("Talk.")))
    await eventually(lambda: len(session.trace) > 3)


async def coroutine_closed(session: Session) -> None:
    work = session.asend("Talk.")
    work.send(None)
    await eventually(lambda: len(session.trace) > 3)
    work.close()


KEPT: list[Any] = []
ENDS: list[Body] = [
    cancelled_in_a_read,
    cancelled_between_reads,
    left_by_a_break,
    left_by_an_exception,
    dropped,
    dropped_in_a_cycle,
    closed,
    still_read_when_the_loop_ends,
    asend_still_waited_for_when_the_loop_ends,
    coroutine_closed,
]


@pytest.mark.parametrize("ends", ENDS, ids=lambda body: body.__name__)
def test_a_reader_that_disappears_leaves_a_session_that_goes_on(ends: Body) -> None:
    engine = chat_engine()
    with engine.session(TALKS) as session, no_new_threads(engine):
        with no_faster_than(engine, left_by_its_reader(session), first=6):
            asyncio.run(ends(session))
        # The next call waits for the step under way, and for nothing else.
        with session._owner.held_for("test"):
            generated = len(session.trace)
        assert 0 < generated < 1000
        assert session.messages[-1]["role"] == "assistant"
        KEPT.clear()
        require_usable(session, exact=True)


@pytest.mark.parametrize("ends", ENDS, ids=lambda body: body.__name__)
def test_nothing_is_left_of_a_reader_that_disappears(ends: Body) -> None:
    engine = chat_engine()
    switched = engine.model.config._attn_implementation
    sessions: list[weakref.ref[Session]] = []

    async def body() -> None:
        session = engine.session(TALKS)
        sessions.append(weakref.ref(session))
        left.append(left_by_its_reader(session))
        await ends(session)

    left: list[Callable[[], bool]] = []
    with no_new_threads(engine):
        with no_faster_than(engine, lambda: left[0](), first=6):
            asyncio.run(body())
        KEPT.clear()

        def gone() -> bool:
            gc.collect()
            return sessions[0]() is None

        until(gone)
    # The last reference gave the model back.
    assert engine.model.config._attn_implementation == switched


def test_a_break_and_the_next_call_in_one_breath() -> None:
    engine = chat_engine()

    async def body(session: Session) -> None:
        for _ in range(5):
            async for _ in session.astream("Talk."):
                break
            reply = await session.asend("And?", timeout_seconds=0.05)
            assert reply.finish_reason in ("cancelled", "stop")
            async for _ in session.astream("Talk."):
                break
            session.fork().close()

    with engine.session(TALKS) as session:
        run_async(body(session))
        require_usable(session, exact=True)


def test_a_loop_that_is_closed_under_its_stream() -> None:
    """Nobody tells the session of it: the next call finds out."""
    engine = chat_engine()
    with engine.session(TALKS) as session:
        loop = asyncio.new_event_loop()
        kept = loop.run_until_complete(read_some(session))
        loop.close()
        session.mark()
        require_usable(session, exact=True)
        assert kept is not None
        del kept
        # And with a reader that waits for an event: the engine's thread finds out.
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(session.asend("Talk."))
        loop.run_until_complete(eventually(lambda: session.trace))
        loop.close()
        until(lambda: session._owner._lease is None)
        # Whoever leaves tasks behind in a closed loop is told so by asyncio.
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]
        del waiting
        require_usable(session, exact=True)


def test_a_loop_of_tools_can_be_closed_from_within() -> None:
    """Garbage collection ends a sync stream wherever it happens to run."""
    loop = WorkerLoop("tools of nobody")

    async def close() -> threading.Thread:
        loop.close()
        return threading.current_thread()

    thread = loop.submit(close()).result(timeout=20)
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_a_dropped_session_ends_with_its_stream() -> None:
    engine = chat_engine()

    async def body() -> weakref.ref[Session]:
        session = engine.session(TALKS)
        events, left = session.astream("Talk."), weakref.ref(session)
        del session
        await anext(events)
        gc.collect()
        # The stream keeps its session alive.
        read = [await anext(events) for _ in range(3)]
        assert len(read) == 3 and left() is not None
        return left

    left = run_async(body())

    def gone() -> bool:
        gc.collect()
        return left() is None

    until(gone)


def test_engines_and_their_threads_are_collected() -> None:
    from tests.test_session.test_async_calls import own_engine

    engine = own_engine()
    with engine.session(FULL) as session, says(engine, f"Hello.{END}"):
        run_async(session.asend("Hi."))
    thread = engine.thread._thread
    assert thread is not None and thread.is_alive()
    left = weakref.ref(engine)
    del engine, session

    def gone() -> bool:
        # The thread may still be at the end of its last round.
        gc.collect()
        return left() is None

    until(gone)
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.mark.parametrize("way", ["cancel the task", "drop", "close", "loop closed"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_reader_that_disappears_while_tools_run(kind: str, way: str) -> None:
    engine = chat_engine()
    released, begun, cancelled = threading.Event(), threading.Event(), threading.Event()

    async def waits(task: str) -> str:
        """Waits.

        Args:
            task: For what.
        """
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "never"

    def blocks(task: str) -> str:
        """Waits.

        Args:
            task: For what.
        """
        begun.set()
        released.wait(timeout=60)
        return "never read"

    tool = waits if kind == "async" else blocks

    async def reach_the_tool(session: Session) -> Any:
        events = session.astream("Wait.")
        async for event in events:
            if isinstance(event, ToolStart):
                break
        await eventually(begun.is_set)
        return events

    async def body(session: Session) -> None:
        with says(engine, call_text(tool.__name__, task="x") + END):
            if way == "cancel the task":
                task = asyncio.ensure_future(session.arun("Wait."))
                await eventually(begun.is_set)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                events = await reach_the_tool(session)
                if way == "close":
                    session.close()
                del events
        await eventually(lambda: cancelled.is_set() or kind == "sync")

    with engine.session(FULL, tools=[tool]) as session, no_new_threads(engine):
        if way == "loop closed":
            loop = asyncio.new_event_loop()
            with says(engine, call_text(tool.__name__, task="x") + END):
                loop.run_until_complete(reach_the_tool(session))
            for task in asyncio.all_tasks(loop):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()
        else:
            asyncio.run(body(session))
            assert cancelled.is_set() == (kind == "async")
        if way != "close":
            with says(engine, f"Fine.{END}"):
                session.send("Well?")
            (answer,) = [item["content"] for item in session.messages if item["role"] == "tool"]
            assert "cancelled before it finished" in answer
            require_usable(session, exact=True)
        released.set()


def test_nothing_is_left_of_tools_in_a_closed_loop() -> None:
    engine = chat_engine()
    sessions: list[weakref.ref[Session]] = []

    async def waits(task: str) -> str:
        """Waits.

        Args:
            task: For what.
        """
        await asyncio.sleep(60)
        return "never"

    async def reach_the_tool() -> Any:
        session = engine.session(FULL, tools=[waits])
        sessions.append(weakref.ref(session))
        events = session.astream("Wait.")
        async for event in events:
            if isinstance(event, ToolStart):
                return events

    loop = asyncio.new_event_loop()
    with says(engine, call_text("waits", task="x") + END):
        events = loop.run_until_complete(reach_the_tool())
    assert sessions[0]() is not None
    tasks = [weakref.ref(task) for task in asyncio.all_tasks(loop)]
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    del loop, task, events

    def gone() -> bool:
        gc.collect()
        return sessions[0]() is None and not any(item() for item in tasks)

    until(gone)
