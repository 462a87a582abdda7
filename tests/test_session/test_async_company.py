"""Many asynchronous sessions on one engine: in the same steps, and as if each were alone."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from sfi_agent import (
    Engine,
    Evidence,
    Instruments,
    Selection,
    Session,
    SessionConfig,
    TurnEnd,
)
from sfi_agent.engine.runner import Runner
from sfi_agent.plugins import temporary_plugins
from sfi_agent.session.asynchronous.channel import UNDELIVERED_EVENTS
from sfi_agent.session.asynchronous.prefill_pieces import is_prefill
from tests.fakes import FakeConfig, selector_plugin
from tests.test_session.async_cases import (
    collected,
    eventually,
    in_another_thread,
    no_faster_than,
    run_async,
    state_of,
    timeless,
)
from tests.test_session.conversations import DENSE, FULL, chat_engine, policy, require_whole

pytestmark = pytest.mark.timeout(120)

KINDS: list[dict[str, Any]] = [
    {"mode": "dense"},
    {"memory": {"selected_tokens": 2048}},
    {},
    {"slow_step": "rectify"},
    {"slow_step": "verify"},
    {"selector": {"name": "top_k"}, "boundaries": [{"name": "interval", "every_tokens": 3}]},
]
CHUNK_TOKENS = 7


def one_of_each(rng: random.Random) -> list[SessionConfig]:
    """A session of every kind, greedy or sampled, in any order."""
    kinds = [{**kind, "sampling": sampling(rng)} for kind in KINDS]
    rng.shuffle(kinds)
    return [policy(**kind) for kind in kinds]


def sampling(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": rng.choice([0.0, 0.9]),
        "seed": rng.randrange(2**31),
        "max_new_tokens": rng.randrange(8, 40),
    }


def messages(rng: random.Random, count: int) -> list[str]:
    words = ["where", "is", "Ada", "now", "42", "röom", "?"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 30))) for _ in range(count)]


@contextmanager
def watched_passes(engine: Engine) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens per row of every forward pass."""
    passes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        passes.append(tuple(kwargs["input_ids"].shape))

    handle = engine.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def company_engine(steps: str) -> Engine:
    """Steps by forward passes, or by the programs that a device would capture."""
    engine = chat_engine(prefill_chunk_tokens=16)
    if steps == "programs":
        engine = Engine(engine.model, engine.tokenizer, prefill_chunk_tokens=16)
        engine.runner = Runner(engine.model, engine.shape, 16, execution="uncaptured")
    return engine


@pytest.mark.parametrize("steps", ["eager", "eager", "programs"])
def test_what_a_session_says_does_not_depend_on_the_others(steps: str) -> None:
    """Sessions of all kinds, two turns each, begun at different times."""
    seed = random.randrange(2**31)
    rng, engine = random.Random(seed), company_engine(steps)
    configs = one_of_each(rng)
    texts = [messages(rng, 2) for _ in configs]
    delays = [[rng.random() * 0.05 for _ in range(2)] for _ in configs]

    async def talk(session: Session, said: Sequence[str], waits: Sequence[float]) -> list[Any]:
        replies = []
        for text, wait in zip(said, waits, strict=True):
            await asyncio.sleep(wait)
            replies.append(timeless(await session.asend(text)))
        return replies

    async def together(sessions: Sequence[Session]) -> list[list[Any]]:
        talks = map(talk, sessions, texts, delays)
        return list(await asyncio.gather(*talks))

    with ExitStack() as stack:
        alone = [stack.enter_context(engine.session(config)) for config in configs]
        beside = [stack.enter_context(engine.session(config)) for config in configs]
        with watched_passes(engine) as passes:
            got = run_async(together(beside))
        expected = [
            [timeless(session.send(text)) for text in said]
            for session, said in zip(alone, texts, strict=True)
        ]
        assert max(rows for rows, _ in passes) > 1, "they never shared a step"
        same = []
        for number, (one, other) in enumerate(zip(alone, beside, strict=True)):
            require_whole(other, exact=False)
            same.append(state_of(one) == state_of(other) and got[number] == expected[number])
        # In very rare cases the rounding of matrix products decides between two tokens.
        assert same.count(False) <= 1, (seed, same)
    if steps == "programs":
        engine.close()


def test_sessions_get_their_tokens_in_turn() -> None:
    engine = chat_engine()
    order: list[int] = []
    count, tokens = 4, 30

    def note(number: int) -> Instruments:
        return Instruments(on_logits=lambda position, row: order.append(number))

    async def body(sessions: Sequence[Session]) -> None:
        await asyncio.gather(*(session.asend("Talk.") for session in sessions))

    config = DENSE.replace(sampling={"max_new_tokens": tokens, "temperature": 1.0})
    with ExitStack() as stack, watched_passes(engine) as passes:
        sessions = [stack.enter_context(engine.session(config)) for _ in range(count)]
        for number, session in enumerate(sessions):
            session.attach(note(number))
        # Whoever is first goes on slowly until everybody has begun.
        all_begun = lambda: all(session.trace for session in sessions)  # noqa: E731
        stack.enter_context(no_faster_than(engine, all_begun))
        run_async(body(sessions))
    assert all(number in order for number in range(count))
    # Between two tokens of one, nobody else gets more than the one of this round and the next.
    for number in range(count):
        own = [place for place, found in enumerate(order) if found == number]
        for start, end in itertools.pairwise(own):
            between = order[start + 1 : end]
            assert max((between.count(other) for other in between), default=0) <= 2
    assert sum(rows == count for rows, _ in passes) >= tokens // 2


@pytest.mark.parametrize("slow_step", ["rectify", "verify"])
def test_blocks_do_not_wait_for_sessions_that_have_none(slow_step: str) -> None:
    engine, sampling = chat_engine(), {"max_new_tokens": 40, "temperature": 1.0}
    rounds: list[set[int]] = []
    execute: Any = engine.runner.execute

    def noting(requests: Sequence[Any], *more: Any) -> Any:
        if not any(map(is_prefill, requests)):
            rounds.append({id(request.sequence) for request in requests})
        return execute(requests, *more)

    async def body(sessions: Sequence[Session]) -> None:
        await asyncio.gather(*(session.asend("Talk.") for session in sessions))

    with ExitStack() as stack:
        kinds = [{"slow_step": slow_step}, {}, {}, {"mode": "dense"}]
        sessions = [
            stack.enter_context(engine.session(policy(**kind, sampling=sampling))) for kind in kinds
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.runner, "execute", noting)
            run_async(body(sessions))
        own = id(sessions[0]._core.sequence)
        present = [number for number, found in enumerate(rounds) if own in found]
        # Single slow steps are staggered: one of the four may take one at a time.
        gaps = [after - before for before, after in itertools.pairwise(present)]
        assert max(gaps) <= len(sessions), gaps


def test_a_long_prefill_starves_nobody() -> None:
    """While it takes its chunks, a short conversation gets a token per chunk."""
    engine = chat_engine(prefill_chunk_tokens=CHUNK_TOKENS)
    long_text = "word " * 400

    async def body(long: Session, short: Session) -> int:
        reading = asyncio.ensure_future(long.asend(long_text))
        await eventually(lambda: long.stats.history_tokens > 3 * CHUNK_TOKENS)
        reply = await short.asend("Hi.")
        assert reply.usage.output_tokens == 20
        assert not reading.done() and not long.trace
        done = long.stats.history_tokens
        await reading
        return done

    config = DENSE.replace(sampling={"max_new_tokens": 20})
    with engine.session(config) as long, engine.session(config) as short:
        begun = no_faster_than(engine, lambda: short.token_ids)
        with watched_passes(engine) as passes, begun:
            done = run_async(body(long, short))
        assert done < len(long.token_ids) - 20
        singles = [index for index, shape in enumerate(passes) if shape == (1, 1)]
        # The short one's tokens stand among the long one's chunks, none further than one away.
        gaps = [after - before for before, after in zip(singles[:19], singles[1:19], strict=False)]
        assert len(gaps) >= 15 and max(gaps) <= 2
        for session in (long, short):
            require_whole(session)


def test_a_long_prefill_of_a_sync_call_starves_nobody() -> None:
    engine = chat_engine(prefill_chunk_tokens=CHUNK_TOKENS)

    async def body(long: Session, short: Session) -> None:
        thread = threading.Thread(target=lambda: long.send("word " * 600))
        thread.start()
        await eventually(lambda: long.stats.history_tokens > CHUNK_TOKENS)
        reply = await short.asend("Hi.")
        assert reply.usage.output_tokens == 20
        # Each of its passes waited for a chunk at most, so most of the prefill is still to come.
        assert thread.is_alive() and not long.trace
        assert long.stats.history_tokens < 60 * CHUNK_TOKENS
        await asyncio.get_running_loop().run_in_executor(None, thread.join, 60)

    config = DENSE.replace(sampling={"max_new_tokens": 20})
    with engine.session(config) as long, engine.session(config) as short:
        with no_faster_than(engine, lambda: short.token_ids):
            run_async(body(long, short))
        require_whole(long)
        require_whole(short)


def test_prefills_take_turns() -> None:
    """A short message behind a long one does not wait for all of it."""
    engine = chat_engine(prefill_chunk_tokens=CHUNK_TOKENS)

    async def body(long: Session, short: Session) -> None:
        reading = asyncio.ensure_future(long.asend("word " * 300))
        await eventually(lambda: long.stats.history_tokens > 0)
        await short.asend("A few words, so that there are several chunks to be processed.")
        assert not reading.done() and not long.trace
        await reading

    config = DENSE.replace(sampling={"max_new_tokens": 2})
    with engine.session(config) as long, engine.session(config) as short:
        with no_faster_than(engine, lambda: short.token_ids):
            run_async(body(long, short))
        require_whole(long)
        require_whole(short)


class FailingSelector:
    """Works for a while, then fails."""

    needs: frozenset[str] = frozenset()

    def __init__(self, config: Any) -> None:
        self.left = 3

    def select(self, evidence: Evidence, budget: int) -> Selection:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("a plugin that is broken")
        newest = evidence.logits.sum(2).topk(budget).indices
        counts = newest.new_full(newest.shape[:2], budget)
        return Selection(newest.sort(-1).values + evidence.candidate_start, counts)


def test_a_plugin_that_fails_ends_its_own_session_alone() -> None:
    engine = chat_engine()
    plugin = selector_plugin("failing", FakeConfig, FailingSelector)
    base = policy(memory={"selected_tokens": 4}, sampling={"max_new_tokens": 40})
    text = "Some words to begin with, so that there is something to select from, and more."

    async def body(sessions: Sequence[Session]) -> list[Any]:
        talks = (session.asend(text) for session in sessions)
        return list(await asyncio.gather(*talks, return_exceptions=True))

    with temporary_plugins(failing=plugin), ExitStack() as stack:
        broken = stack.enter_context(engine.session(base.replace(selector={"name": "failing"})))
        good = [stack.enter_context(engine.session(config)) for config in (base, base, FULL)]
        alone = [stack.enter_context(engine.session(config)) for config in (base, base, FULL)]
        error, *replies = run_async(body([broken, *good]))
        assert isinstance(error, Exception) and "broken" in str(error)
        expected = [session.send(text) for session in alone]
        assert list(map(timeless, replies)) == list(map(timeless, expected))
        require_whole(broken, exact=False)


def test_sync_calls_work_beside_the_engines_thread() -> None:
    engine = chat_engine(prefill_chunk_tokens=16)
    config = policy(sampling={"max_new_tokens": 60, "temperature": 0.8})
    text = "Tell me something. " * 8

    async def body(sessions: Sequence[Session], other: Session) -> None:
        tasks = [asyncio.ensure_future(session.asend(text)) for session in sessions]
        await eventually(lambda: all(session.trace for session in sessions))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, other.send, text)
        forked = await loop.run_in_executor(None, other.fork)
        await loop.run_in_executor(
            None,
            forked.decode,
            [],
        )
        forked.close()
        await asyncio.gather(*tasks)

    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.session(config)) for _ in range(4)]
        run_async(body(sessions[:3], sessions[3]))
        assert all(state_of(session) == state_of(sessions[3]) for session in sessions[:3])


def test_loops_in_several_threads_share_the_engine() -> None:
    engine = chat_engine()
    config = policy(sampling={"max_new_tokens": 30, "temperature": 0.8})

    def talk() -> Any:
        with engine.session(config) as session:
            run_async(session.asend("Hello."))
            run_async(session.arun("And?"))
            return state_of(session)

    expected = talk()
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(talk())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [expected] * 4


# ---------------------------------------------------------------- back-pressure


def test_a_slow_reader_pauses_its_own_session_alone() -> None:
    engine = chat_engine()
    config = DENSE.replace(sampling={"max_new_tokens": 300})

    async def body(slow: Session, quick: Session) -> None:
        events = slow.astream("Talk.")
        read = [await anext(events) for _ in range(3)]
        reply = await quick.asend("Talk.")
        assert reply.finish_reason in ("stop", "length"), "the other one was held up"
        assert reply.usage.output_tokens > 2 * UNDELIVERED_EVENTS
        # Every token is an event at least, so that many tokens at most are ahead of the reader.
        paused_at = len(slow.trace)
        assert 3 <= paused_at <= UNDELIVERED_EVENTS + 3
        await quick.asend("More.")
        assert len(slow.trace) == paused_at, "it went on though nobody read"
        read += await collected(events)
        end = read[-1]
        assert isinstance(end, TurnEnd) and timeless(end.reply) == timeless(reply)

    with engine.session(config) as slow, engine.session(config) as quick:
        run_async(body(slow, quick))
        require_whole(slow)


def test_a_reader_that_stops_for_a_while_loses_no_event() -> None:
    engine = chat_engine()
    config = policy(sampling={"max_new_tokens": 200})
    rng = random.Random(5)

    async def body(session: Session) -> list[Any]:
        read = []
        async for event in session.astream("Talk."):
            read.append(timeless(event))
            if rng.random() < 0.05:
                await asyncio.sleep(0.02 * rng.random())
            elif rng.random() < 0.03:
                time.sleep(0.01)
        return read

    with engine.session(config) as one, engine.session(config) as other:
        got = run_async(body(one))
        assert got == [timeless(event) for event in other.stream("Talk.")]


def test_a_paused_session_can_be_cancelled_and_closed() -> None:
    engine = chat_engine()
    config = DENSE.replace(sampling={"max_new_tokens": 500})

    async def body(session: Session) -> None:
        events = session.astream("Talk.")
        await anext(events)
        await eventually(lambda: len(session.trace) >= UNDELIVERED_EVENTS // 3)
        await asyncio.sleep(0.05)
        in_another_thread(session.cancel)
        rest = await collected(events)
        assert isinstance(rest[-1], TurnEnd) and rest[-1].reply.finish_reason == "cancelled"
        assert len(session.trace) < 500
        events = session.astream("Talk.")
        await anext(events)
        session.close()
        assert await collected(events) == []

    with engine.session(config) as session:
        run_async(body(session))
