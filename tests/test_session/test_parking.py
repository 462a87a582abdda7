"""Parked sessions lose nothing, take no memory, and come back when they are used."""

from __future__ import annotations

import errno
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
from tests.families import model_of, tiny_engine
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


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with()
    with engine.session(PLAIN) as session:
        session.decode(TOKENS, max_new_tokens=4)
        expected = session.next_logits()

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("safetensors.torch.save_file", full)
            with pytest.raises(StoreError, match="No space left"):
                engine.park(session, "disk", directory=tmp_path)
        assert torch.equal(session.next_logits(), expected)
        engine.park(session, "disk", directory=tmp_path)
        assert torch.equal(session.next_logits(), expected)


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
