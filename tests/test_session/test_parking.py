"""Parked sessions lose nothing, take no memory, and come back when they are used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sfi_agent import (
    Engine,
    InputError,
    ParkingLimits,
    Session,
    SessionBusy,
    SessionConfig,
    SessionStateError,
    StoreError,
)
from sfi_agent.engine import parked_buffers, saved_history
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.session import parking
from sfi_agent.session.store import rebuilding
from tests.families import model_of, tiny_engine
from tests.test_guarantees.play import close
from tests.test_guarantees.policies import FAMILY_NAMES, for_each, prompts, sparse_policies

TOKENS = list(range(40))
PLAIN = SessionConfig(boundaries=[{"name": "never"}])


def engine_with(**limits: Any) -> Engine:
    return Engine(model_of("llama"), parking=ParkingLimits(**limits))


def buffers(session: Session) -> list[Any]:
    sequence: Any = session._core.sequence
    return [extent.buffer for layer in sequence.layers for extent in layer.history.extents]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_parked_session_goes_on_as_if_it_had_not_been(family: str, tmp_path: Path) -> None:
    """With a fork that reads the same history, parked in any order, before or after it."""

    @for_each(
        family,
        3,
        config=sparse_policies(),
        turns=st.lists(prompts, min_size=3, max_size=3),
        moves=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["host", "disk"])), max_size=5),
        cut=st.integers(0, 4),
    )
    def check(
        config: SessionConfig, turns: list[list[int]], moves: list[tuple[int, Any]], cut: int
    ) -> None:
        engine = tiny_engine(family)
        outputs = []
        for parks in (False, True):
            with engine.session(config) as parent:
                parent.decode(turns[0], max_new_tokens=5)
                with parent.fork(seed=7) as child:
                    child.decode(turns[1], max_new_tokens=4)
                    parent.rewind(parent.mark(len(parent.token_ids) - cut))
                    if parks:
                        for who, place in moves:
                            engine.park((parent, child)[who], place, directory=tmp_path)
                        assert not list(tmp_path.iterdir()), "files keep no name"
                    told = [parent.next_logits(), child.next_logits()]
                    told += [
                        torch.tensor(s.decode(turns[2], max_new_tokens=6)) for s in (child, parent)
                    ]
                    assert parent.parked is None and child.parked is None
                    told += [parent.next_logits(), child.next_logits()]
                    outputs.append((told, parent.token_ids, child.token_ids))
        (plain, *ids), (parked, *again) = outputs
        assert ids == again
        assert all(torch.equal(one, other) for one, other in zip(plain, parked, strict=True))


def test_what_is_shared_moves_when_nobody_reads_it(tmp_path: Path) -> None:
    engine = engine_with(directory=tmp_path)
    with engine.session(PLAIN) as parent:
        parent.decode(TOKENS, max_new_tokens=3)
        with parent.fork() as child:
            child.decode([1, 2], max_new_tokens=3)
            held = engine.parking.device_bytes()
            memories = sum(s.stats.memory_bytes for s in (parent, child))
            engine.park(parent)
            assert parent.parked == "disk" and child.parked is None
            # The child still reads the shared part; only the parent's memories are free.
            assert buffers(child)[0] is buffers(parent)[0]
            history = held - memories
            assert history <= engine.parking.device_bytes() < held
            engine.park(child)
            assert engine.parking.device_bytes() == 0
            parent.next_logits()
            assert parent.parked is None and child.parked == "disk"
            assert engine.parking.device_bytes() > 0
        # A closed session does not keep anything either.
    assert engine.parking.device_bytes() == 0


@pytest.mark.parametrize("leaves_first", ["parent", "child"])
def test_a_fork_on_disk_takes_nothing_from_a_parent_in_host_memory(
    leaves_first: str, tmp_path: Path
) -> None:
    """The parent reads more of the buffer that both read; where it is parked decides."""
    engine = tiny_engine("gemma3")
    with engine.session(PLAIN) as parent, engine.session(PLAIN) as same:
        for session in (parent, same):
            session.decode(TOKENS, max_new_tokens=3)
        with parent.fork(seed=1) as child:
            for session in (parent, same):
                session.decode([5, 6, 7], max_new_tokens=9)
            places: list[tuple[Session, Any]] = [(parent, "host"), (child, "disk")]
            for session, place in places if leaves_first == "parent" else reversed(places):
                engine.park(session, place, directory=tmp_path)
            assert torch.equal(parent.next_logits(), same.next_logits())
            assert parent.decode([1], max_new_tokens=6) == same.decode([1], max_new_tokens=6)
            assert child.decode([2, 3], max_new_tokens=2)


def test_parked_buffers_hold_only_what_is_read(tmp_path: Path) -> None:
    engine = engine_with()
    with engine.session(PLAIN.replace(history={"reserve_tokens": 50_000})) as session:
        session.decode(TOKENS, max_new_tokens=3)
        tokens = session.stats.history_tokens
        engine.park(session, "disk", directory=tmp_path)
        assert {buffer.capacity for buffer in buffers(session)} == {tokens}
        session.next_logits()
        # The room that was asked for is there again.
        assert {buffer.capacity for buffer in buffers(session)} == {50_000}


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    # Histories that do not grow: all sessions are of one size.
    roomy = PLAIN.replace(history={"reserve_tokens": 200})
    with engine_with().session(roomy) as alone:
        alone.decode(TOKENS, max_new_tokens=1)
        one, history = alone.engine.parking.device_bytes(), alone.stats.history_bytes
    limit = 2 * one + history // 2
    engine = engine_with(device_bytes=limit, directory=tmp_path)
    sessions = [engine.session(roomy) for _ in range(4)]
    for session in sessions:
        session.decode(TOKENS, max_new_tokens=1)
    # The fourth found three: the first had to leave.
    assert [session.parked for session in sessions] == ["disk", None, None, None]
    sessions[1].decode([5], max_new_tokens=1)
    assert [session.parked for session in sessions] == ["disk", None, "disk", None]
    sessions[0].decode([5], max_new_tokens=1)
    assert [session.parked for session in sessions] == [None, None, "disk", "disk"]
    assert engine.parking.device_bytes() <= 2 * one
    for session in sessions:
        session.close()


def test_a_session_at_work_stays(tmp_path: Path) -> None:
    engine = engine_with(device_bytes=0, directory=tmp_path)
    with engine.session(PLAIN) as worker, engine.session(PLAIN) as other:
        worker.decode(TOKENS, max_new_tokens=1)
        with worker._owner.held_for("decode"):
            other.decode(TOKENS, max_new_tokens=1)
            assert worker.parked is None and other.parked is None
            with pytest.raises(SessionBusy, match="park"):
                engine.park(worker)
        other.decode([1], max_new_tokens=1)
        assert worker.parked == "disk"


@pytest.mark.parametrize("written", [0, 3])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The session is where it was, also where some of it had been moved already."""
    engine = engine_with()
    with engine.session(PLAIN) as session:
        session.decode(TOKENS, max_new_tokens=4)
        expected, history = session.next_logits(), session.stats.history_bytes
        with monkeypatch.context() as patched:
            fill_disk(patched, written)
            with pytest.raises(StoreError, match="No space left"):
                engine.park(session, "disk", directory=tmp_path)
        assert session.parked is None and not list(tmp_path.iterdir())
        assert engine.parking.device_bytes() == session.stats.history_bytes == history
        # And it can leave when there is room.
        engine.park(session, "disk", directory=tmp_path)
        assert session.parked == "disk" and engine.parking.device_bytes() == 0
        assert torch.equal(session.next_logits(), expected)


def fill_disk(patched: pytest.MonkeyPatch, written: int) -> None:
    """Whoever parks can write so many tensors more."""
    left, write = [written], parked_buffers._write_tokens

    def full(*arguments: Any) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        write(*arguments)

    patched.setattr(parked_buffers, "_write_tokens", full)


def test_what_only_a_closed_fork_kept_leaves_too(tmp_path: Path) -> None:
    engine = engine_with(device_bytes=1, directory=tmp_path)
    with engine.session(PLAIN) as parent, engine.session(PLAIN) as worker:
        parent.decode(TOKENS, max_new_tokens=3)
        expected = parent.next_logits()
        with parent.fork() as child:
            engine.park(parent)
            assert child.parked is None and engine.parking.device_bytes() > 0
        worker.decode([1], max_new_tokens=1)
        own = worker.stats.history_bytes + worker.stats.memory_bytes
        assert engine.parking.device_bytes() == own
        assert torch.equal(parent.next_logits(), expected)


def test_on_a_cpu_what_was_parked_beside_goes_to_disk(tmp_path: Path) -> None:
    engine = engine_with(device_bytes=1, directory=tmp_path)
    with engine.session(PLAIN) as idle, engine.session(PLAIN) as worker:
        idle.decode(TOKENS, max_new_tokens=3)
        engine.park(idle, "host")
        worker.decode([1], max_new_tokens=1)
        assert idle.parked == "disk"


def test_who_wants_a_session_that_is_leaving_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That another session needed the room is nothing to be refused for."""
    engine = engine_with(device_bytes=1, directory=tmp_path)
    with engine.session(PLAIN) as idle, engine.session(PLAIN) as worker:
        idle.decode(TOKENS, max_new_tokens=3)
        expected, real = idle.next_logits(), parked_buffers.move_to_disk
        with ThreadPoolExecutor(1) as pool:
            wanted: list[Future[Any]] = []

            def slow(*arguments: Any) -> None:
                if not wanted:
                    wanted.append(pool.submit(idle.next_logits))
                    waiters = idle._owner._changed._waiters  # type: ignore[attr-defined]
                    while not waiters and not wanted[0].done():
                        os.sched_yield()
                real(*arguments)

            monkeypatch.setattr(parking, "move_to_disk", slow)
            worker.decode([1], max_new_tokens=1)
            assert torch.equal(wanted[0].result(), expected)


@pytest.mark.parametrize("how", ["fork", "load"])
def test_nobody_parks_what_is_not_whole_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    engine = engine_with(device_bytes=1, directory=tmp_path / "parked")
    with engine.session(PLAIN) as session, engine.session(PLAIN) as worker:
        worker.decode([2], max_new_tokens=1)
        session.decode(TOKENS, max_new_tokens=3)
        expected = session.next_logits()
        session.save(tmp_path / "saved")

        def first(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(worker.decode, [1], max_new_tokens=1).result()
                return real(*arguments, **keywords)

            return call

        if how == "fork":
            share = SequenceState.share_history_with
            monkeypatch.setattr(SequenceState, "share_history_with", first(share))
            made = session.fork()
        else:
            monkeypatch.setattr(rebuilding, "restore_history", first(saved_history.restore_history))
            made = engine.load_session(tmp_path / "saved")
        with made:
            assert made.stats.history_tokens == session.stats.history_tokens
            assert close(made.next_logits(), expected)


def test_a_load_is_work_for_which_others_leave(tmp_path: Path) -> None:
    engine = engine_with(device_bytes=1, directory=tmp_path / "parked")
    with engine.session(PLAIN) as session:
        session.decode(TOKENS, max_new_tokens=3)
        session.save(tmp_path / "saved")
        with engine.load_session(tmp_path / "saved"):
            assert session.parked == "disk"


@pytest.mark.parametrize("given", [b"bytes", 3, "", "a\0b", "half a \ud800 character"])
def test_where_sessions_park_is_a_path(given: Any) -> None:
    engine = engine_with()
    with pytest.raises(InputError, match="path"):
        ParkingLimits(directory=given)
    with engine.session(PLAIN) as session:
        session.decode(TOKENS, max_new_tokens=1)
        with pytest.raises(InputError, match="path"):
            engine.park(session, "disk", directory=given)
        assert session.parked is None


@pytest.mark.parametrize("name", ["a file", "n" * 300])
def test_where_no_folder_can_be_is_said(tmp_path: Path, name: str) -> None:
    engine = engine_with()
    (tmp_path / "a file").touch()
    with engine.session(PLAIN) as session:
        session.decode(TOKENS, max_new_tokens=1)
        with pytest.raises(StoreError, match=name):
            engine.park(session, "disk", directory=tmp_path / name)
        assert session.parked is None


def test_what_cannot_be_parked_is_said(tmp_path: Path) -> None:
    engine, other = engine_with(), engine_with()
    with engine.session(PLAIN) as session:
        session.decode(TOKENS, max_new_tokens=1)
        with pytest.raises(InputError, match="'host' or 'disk'"):
            engine.park(session, "moon")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="directory"):
            engine.park(session, "disk")
        with pytest.raises(InputError, match="another engine"):
            other.park(session, "host")
        assert session.parked is None
    with pytest.raises(SessionStateError, match="closed"):
        engine.park(session, "host")
    for wrong in ({"device_bytes": -1}, {"device_bytes": 1.5}, {"host_bytes": 5}):
        with pytest.raises(InputError):
            ParkingLimits(**wrong)
    with pytest.raises(InputError, match="directory"):
        engine_with(device_bytes=5)
