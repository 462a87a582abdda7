"""Parking on a CUDA device: memory is given back, and sessions come back with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfi_agent import Engine, ParkingLimits, SessionConfig
from tests.families import FAMILIES, build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
TOKENS = 20_000
CONFIG = SessionConfig(
    boundaries=[{"name": "interval", "every_tokens": 5}],
    memory={"selected_tokens": 64, "recent_tokens": 16},
    refresh={"min_segment_tokens": 2, "max_segment_tokens": 7},
)


def engine_with(**limits: Any) -> Engine:
    family = next(family for family in FAMILIES if family.name == "llama")
    model = build_model(
        family, dtype=torch.float32, device="cuda", max_position_embeddings=2 * TOKENS
    )
    return Engine(model, parking=ParkingLimits(**limits))


@pytest.mark.parametrize("history_device", ["same", "cpu"])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_parked_session_holds_nothing_on_the_device(
    place: Any, history_device: str, tmp_path: Path
) -> None:
    engine = engine_with()
    config = CONFIG.replace(history={"device": history_device})
    with engine.session(config) as session, engine.session(config) as other:
        for one in (session, other):
            one.decode([index % 97 for index in range(TOKENS)], max_new_tokens=20)
        expected = session.next_logits()
        with session.fork() as fork:
            onward = fork.decode([], max_new_tokens=30)
        held = engine.parking.device_bytes()
        before = torch.cuda.memory_allocated()
        engine.park(session, place, directory=tmp_path)
        assert session.parked == place and not list(tmp_path.iterdir())
        freed = before - torch.cuda.memory_allocated()
        if history_device == "same":
            assert engine.parking.device_bytes() <= held // 2 + 1
            assert freed >= 0.9 * session.stats.history_bytes * (place == "host")
            assert freed > 0
        # The other one is stepped meanwhile, captured, over what is its own.
        other.decode([], max_new_tokens=10)
        assert torch.equal(session.next_logits(), expected)
        assert session.parked is None
        assert session.decode([], max_new_tokens=30) == onward


def test_sessions_leave_for_host_memory_and_then_for_disk(tmp_path: Path) -> None:
    engine = engine_with(device_bytes=1, host_bytes=1, directory=tmp_path)
    sessions = [engine.session(CONFIG) for _ in range(3)]
    for session in sessions:
        session.decode([index % 97 for index in range(500)], max_new_tokens=5)
    assert sessions[2].parked is None
    assert [session.parked for session in sessions[:2]] == ["disk", "disk"]
    answers = [session.decode([], max_new_tokens=8) for session in sessions]
    assert answers[0] == answers[1] == answers[2]
    for session in sessions:
        session.close()
