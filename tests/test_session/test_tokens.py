"""The token level of a session: decode, marks, rewind, fork, next logits, states, one owner."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from sfi_agent import (
    Engine,
    InputError,
    Session,
    SessionBusy,
    SessionConfig,
    SessionStateError,
    TokenEvent,
)
from sfi_agent.plugins import temporary_plugins
from tests.fakes import FakeConfig, FakeDetector, detector_plugin
from tests.families import VOCABULARY, model_of, tiny_engine

CONFIG = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 4}],
    memory={"sink_tokens": 2, "selected_tokens": 6, "recent_tokens": 4},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 6},
    sampling={"max_new_tokens": 5},
)
PROMPT = list(range(10, 40))


@pytest.fixture
def session() -> Iterator[Session]:
    with tiny_engine("llama").session(CONFIG) as opened:
        yield opened


def test_an_engine_without_a_tokenizer_decodes_ids() -> None:
    with Engine(model_of("llama")).session(CONFIG) as session:
        assert len(session.decode([1, 2], max_new_tokens=3)) == 3


def test_decode_returns_what_it_generated_and_keeps_everything(session: Session) -> None:
    first = session.decode(PROMPT, max_new_tokens=4)
    assert session.token_ids == PROMPT + first
    second = session.decode([7], max_new_tokens=3)
    assert session.token_ids == [*PROMPT, *first, 7, *second]
    assert (len(first), len(second)) == (4, 3)
    third = session.decode([], max_new_tokens=2)
    assert session.token_ids[-2:] == third


def test_the_default_limit_is_the_configured_one(session: Session) -> None:
    assert len(session.decode(PROMPT)) == 5


def test_no_new_tokens_means_processing_only(session: Session) -> None:
    assert session.decode(PROMPT, max_new_tokens=0) == []
    assert session.token_ids == PROMPT
    assert session.stats.history_tokens == len(PROMPT) - 1
    assert session.trace == []
    at_once = tiny_engine("llama").session(CONFIG)
    generated = at_once.decode(PROMPT, max_new_tokens=1)
    assert session.decode([], max_new_tokens=1) == generated
    at_once.close()


def test_a_stop_id_ends_and_is_the_last_returned() -> None:
    engine = tiny_engine("llama")
    with engine.session(CONFIG) as free, engine.session(CONFIG) as stopped:
        whole = free.decode(PROMPT, max_new_tokens=12)
        stop = whole[6]
        expected = whole[: whole.index(stop) + 1]
        assert stopped.decode(PROMPT, max_new_tokens=12, stop_ids={stop}) == expected
        assert stopped.token_ids[-1] == stop
        # The stop id is pending like any other last token.
        assert stopped.stats.history_tokens == len(stopped.token_ids) - 1


def test_no_id_stops_by_itself() -> None:
    """Not even the model's end-of-sequence id."""
    engine = tiny_engine("llama")
    with engine.session(CONFIG) as session:
        generated = session.decode(PROMPT, max_new_tokens=1)
    eos = engine.model.config.eos_token_id
    engine.model.config.eos_token_id = generated[0]
    try:
        with engine.session(CONFIG) as session:
            assert len(session.decode(PROMPT, max_new_tokens=6)) == 6
    finally:
        engine.model.config.eos_token_id = eos


def test_views_are_copies(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=2)
    session.token_ids.clear()
    session.trace.clear()
    assert len(session.token_ids) == len(PROMPT) + 2
    assert len(session.trace) == 2


def test_a_trace_tells_of_every_generated_token(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=12)
    session.decode([5, 6], max_new_tokens=1)
    records = session.trace
    ids = session.token_ids
    assert [r.token_id for r in records] == [*ids[30:42], ids[44]]
    assert [r.position for r in records] == [*range(30, 42), 44]
    kinds = [(r.kind, r.reason) for r in records]
    boundary = ("slow", "interval: 4 tokens")
    prefill, fast = ("slow", "prefill"), ("fast", "")
    # Four tokens are shown, then the fifth step is slow; then every fourth token again.
    assert kinds[:9] == [prefill, *[fast] * 3, boundary, *[fast] * 3, boundary]
    assert kinds[12] == prefill
    assert [r.segment_tokens for r in records[:6]] == [0, 1, 2, 3, 0, 1]
    assert [r.memory_tokens for r in records[1:4]] == [13, 14, 15]
    assert {r.slow_step for r in records if r.kind == "slow"} == {"observe"}
    assert {r.slow_step for r in records if r.kind == "fast"} == {None}
    assert all(r.seconds > 0 for r in records)


def test_mode_dense_is_all_slow() -> None:
    with tiny_engine("llama").session(CONFIG.replace(mode="dense")) as session:
        session.decode(PROMPT, max_new_tokens=4)
        assert [(r.kind, r.slow_step) for r in session.trace] == [("slow", None)] * 4
        assert [r.reason for r in session.trace] == ["prefill", "dense", "dense", "dense"]
        assert [r.memory_tokens for r in session.trace] == [30, 31, 32, 33]
        stats = session.stats
        assert (stats.dense_passes, stats.slow_share, stats.memory_bytes) == (3, 0.75, 0)


def test_stats_count_steps_and_bytes(session: Session) -> None:
    assert session.stats.generated_tokens == 0 and session.stats.slow_share == 0.0
    session.decode(PROMPT, max_new_tokens=9)
    stats = session.stats
    assert (stats.generated_tokens, stats.fast_tokens, stats.slow_tokens) == (9, 6, 3)
    assert (stats.retry_tokens, stats.dense_passes) == (0, 2)
    assert stats.slow_share == pytest.approx(2 / 9)
    assert stats.history_tokens == 38
    # Three layers of keys and values, two heads of sixteen float32 numbers.
    assert stats.history_bytes >= 38 * 3 * 2 * 2 * 16 * 4
    assert stats.memory_bytes == 3 * 2 * 2 * 16 * 4 * (6 + 2 + 4 + 7)


def test_a_rewind_takes_its_records_back(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=9)
    session.rewind(session.mark(34))
    assert [r.position for r in session.trace] == [30, 31, 32, 33]
    assert session.stats.generated_tokens == 4
    session.rewind(session.mark(3))
    assert session.trace == [] and session.token_ids == PROMPT[:3]


def test_next_logits_say_what_comes_and_change_nothing(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=3)
    before, stats = session.token_ids, session.stats
    logits = session.next_logits()
    assert logits.shape == (VOCABULARY,)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    assert torch.equal(session.next_logits(), logits)
    assert (session.token_ids, session.stats) == (before, stats)
    assert session.decode([], max_new_tokens=1) == [int(logits.argmax())]


def test_next_logits_of_ids_that_were_never_processed() -> None:
    with tiny_engine("llama").session(CONFIG) as session:
        session.decode(PROMPT, max_new_tokens=0)
        logits = session.next_logits()
        assert session.stats.history_tokens == 29
        assert session.decode([], max_new_tokens=1) == [int(logits.argmax())]


def test_marks_count_ids(session: Session) -> None:
    empty = session.mark()
    session.decode(PROMPT, max_new_tokens=3)
    assert (empty.token_count, session.mark().token_count) == (0, 33)
    for count in (-1, 34):
        with pytest.raises(InputError, match="0 to 33"):
            session.mark(count)
    session.rewind(empty)
    assert session.token_ids == []
    assert session.decode(PROMPT, max_new_tokens=1)


@pytest.mark.parametrize("count", [1.0, "3", True])
def test_a_mark_at_no_count(session: Session, count: object) -> None:
    session.decode(PROMPT, max_new_tokens=3)
    with pytest.raises(InputError, match="token_count"):
        session.mark(count)  # type: ignore[arg-type]


def test_earlier_marks_survive_a_rewind_and_later_ones_do_not(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=5)
    early, middle, late = session.mark(20), session.mark(32), session.mark()
    session.rewind(middle)
    session.decode([1], max_new_tokens=5)
    assert len(session.token_ids) > late.token_count
    with pytest.raises(SessionStateError, match="no longer valid"):
        session.rewind(late)
    session.rewind(middle)
    session.rewind(early)
    with pytest.raises(SessionStateError):
        session.rewind(middle)
    assert session.token_ids == PROMPT[:20]


def test_a_mark_set_after_a_rewind_is_a_new_one(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=5)
    session.rewind(session.mark(10))
    session.decode([1], max_new_tokens=5)
    again = session.mark(14)
    ids = session.token_ids
    session.decode([2], max_new_tokens=2)
    session.rewind(again)
    assert session.token_ids == ids[:14]


def test_a_mark_of_another_session_is_refused(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=1)
    with session.fork() as child, pytest.raises(InputError, match="another session"):
        child.rewind(session.mark())
    with pytest.raises(InputError):
        session.rewind("the start")  # type: ignore[arg-type]


def test_a_fork_goes_its_own_way(session: Session) -> None:
    session.decode(PROMPT, max_new_tokens=3)
    with session.fork() as child:
        assert (child.status, child.config) == ("open", session.config)
        assert (child.token_ids, child.trace) == (session.token_ids, session.trace)
        assert child.decode([], max_new_tokens=4) == session.decode([], max_new_tokens=4)
        child.decode([9], max_new_tokens=2)
        assert len(child.token_ids) == len(session.token_ids) + 3


def test_forks_with_seeds_of_their_own_sample_differently() -> None:
    config = CONFIG.replace(sampling={"temperature": 2.0, "seed": 3})
    with tiny_engine("llama").session(config) as parent:
        parent.decode(PROMPT, max_new_tokens=3)
        found = []
        for seed in (None, 3, 4, 4):
            with parent.fork(seed=seed) as child:
                found.append(child.decode([], max_new_tokens=12))
        assert found[0] == found[1] == parent.decode([], max_new_tokens=12)
        assert found[2] == found[3] != found[0]


def test_a_child_outlives_its_parent() -> None:
    parent = tiny_engine("llama").session(CONFIG)
    parent.decode(PROMPT, max_new_tokens=3)
    child = parent.fork()
    expected = parent.decode([], max_new_tokens=6)
    parent.close()
    assert child.decode([], max_new_tokens=6) == expected
    child.close()


def test_states() -> None:
    session = tiny_engine("llama").session(CONFIG)
    found = [session.status]
    with session:
        found.append(session.status)
    session.close()
    assert [*found, session.status] == ["new", "open", "closed"]
    assert "closed" in repr(session)
    with pytest.raises(SessionStateError):
        session.decode([1])


def test_a_second_caller_gets_busy_not_a_race() -> None:
    """A thread tries every call while another one is in the middle of decoding."""
    detector = FakeDetector(None)
    plugin = detector_plugin("meeting", FakeConfig, lambda config, tokenizer: detector)
    reached, go_on = threading.Event(), threading.Event()

    def after_token(event: TokenEvent) -> None:
        reached.set()
        assert go_on.wait(20)

    with temporary_plugins(meeting=plugin):
        session = tiny_engine("llama").session(SessionConfig(boundaries=[{"name": "meeting"}]))
        session.decode(PROMPT, max_new_tokens=1)
        mark = session.mark()
        detector.after_token = after_token  # type: ignore[method-assign]
        worker = threading.Thread(target=lambda: session.decode([], max_new_tokens=3))
        worker.start()
        assert reached.wait(20)
        try:
            for name, call in {
                "decode": lambda: session.decode([1]),
                "next_logits": session.next_logits,
                "mark": session.mark,
                "rewind": lambda: session.rewind(mark),
                "fork": session.fork,
                "close": session.close,
            }.items():
                with pytest.raises(SessionBusy, match=rf"session\.{name}\(\).*session\.decode\(\)"):
                    call()
        finally:
            go_on.set()
            worker.join(20)
    assert len(session.token_ids) == len(PROMPT) + 4
    session.close()


def test_sessions_in_threads_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    engine = tiny_engine("qwen3")
    prompts = [list(range(start, start + 30)) for start in (5, 20, 35, 50)]

    def decode(prompt: list[int]) -> list[int]:
        with engine.session(CONFIG) as session:
            return session.decode(prompt, max_new_tokens=12)

    alone = [decode(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(decode, prompts)) == alone
