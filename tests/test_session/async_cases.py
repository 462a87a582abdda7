"""What tests of asynchronous calls share: waiting, counting threads, and scripted conversations."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from sfi_agent import Engine, Reply, Session, Step, StepRecord
from sfi_agent.session.events import Event, TurnEnd

__all__ = [
    "END",
    "TOOLS",
    "awork",
    "eventually",
    "in_another_thread",
    "no_faster_than",
    "no_new_threads",
    "run_async",
    "timeless",
    "until",
    "work",
]

END = "<|im_end|>"
T = TypeVar("T")


def work(task: str) -> str:
    """Works.

    Args:
        task: What to do.
    """
    return f"done with {task}"


async def awork(task: str) -> str:
    """Works, and waits for it.

    Args:
        task: What to do.
    """
    await asyncio.sleep(0.001)
    return f"done with {task}"


TOOLS: list[Callable[..., Any]] = [work, awork]


def run_async(body: Coroutine[Any, Any, T]) -> T:
    """Run a test in an event loop that must be left without tasks."""

    async def watched() -> T:
        result = await body
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        return result

    return asyncio.run(watched())


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


async def eventually(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """As `until`, in an event loop."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        await asyncio.sleep(0.001)


@contextmanager
def no_faster_than(
    engine: Engine, done: Callable[[], Any], *, first: int = 1, seconds: float = 0.25
) -> Iterator[None]:
    """Forward passes from the n-th on wait for something that another thread or task does.

    Each waits a while at most, so that a slow machine has many of them to do it, and nothing
    hangs where the passes themselves are waited for.
    """
    passes = 0

    def wait(*_: Any) -> None:
        nonlocal passes
        passes += 1
        end = time.monotonic() + seconds
        while passes >= first and not done() and time.monotonic() < end:
            time.sleep(0.001)

    layers = engine.model.get_decoder().layers
    handle = layers[len(layers) // 2].register_forward_pre_hook(wait)
    try:
        yield
    finally:
        handle.remove()


def in_another_thread(action: Callable[[], Any]) -> Any:
    """Run something in a thread of its own; what it raises is returned."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=20)
    assert results, "the thread hangs"
    return results[0]


@contextmanager
def no_new_threads(engine: Engine) -> Any:
    """No thread but the engine's is left behind."""
    before = set(threading.enumerate())
    yield
    gc.collect()

    def left() -> set[str]:
        new = set(threading.enumerate()) - before
        return {thread.name for thread in new if thread.name != "sfi-agent-engine"}

    until(lambda: not left())


def timeless(value: Any) -> Any:
    """The same without wall-clock times, so that two decodings can be compared."""
    if isinstance(value, StepRecord):
        return replace(value, seconds=0.0)
    if isinstance(value, Step):
        return replace(value, record=timeless(value.record))
    if isinstance(value, Reply):
        return replace(value, steps=tuple(map(timeless, value.steps)))
    if isinstance(value, TurnEnd):
        return TurnEnd(timeless(value.reply))
    return value


def state_of(session: Session) -> tuple[Any, ...]:
    """What a turn changes."""
    return session.token_ids, session.messages, [timeless(item) for item in session.trace]


async def collected(events: Any, into: list[Event] | None = None) -> list[Event]:
    """All events of a stream."""
    found: list[Event] = [] if into is None else into
    async for event in events:
        found.append(event)
    return found
