"""What a caller has switched on for itself changes nothing about a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from sfi_agent import Engine, SessionConfig
from sfi_agent.engine.surroundings import own_surroundings
from sfi_agent.observe.trace import SlowStepKind
from tests.families import model_of

CPU = torch.device("cpu")
PROMPT = [(7 * index * index + 3) % 101 for index in range(20)]
Surroundings = Callable[[], AbstractContextManager[object]]

autocast: Surroundings = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
CALLERS: list[tuple[SlowStepKind, Surroundings, Surroundings]] = [
    ("observe", torch.inference_mode, nullcontext),
    ("verify", nullcontext, torch.inference_mode),
    ("rectify", autocast, torch.inference_mode),
]


def everything(
    first: Surroundings, later: Surroundings, slow_step: SlowStepKind, folder: Path
) -> list[int]:
    """Turns, a fork, a rewind, a batch, a save and a parking, by callers that take turns."""
    config = SessionConfig(
        slow_step=slow_step,
        boundaries=[{"name": "entropy", "threshold_nats": 2.0}],
        selector={"name": "kl_fusion"},
        memory={"sink_tokens": 1, "selected_tokens": 4, "recent_tokens": 3},
        refresh={"min_segment_tokens": 2, "max_segment_tokens": 5},
        sampling={"temperature": 0.8},
    )
    with first():
        engine = Engine(model_of("llama"))
        session = engine.session(config)
        session.decode(PROMPT, max_new_tokens=4)
    with later():
        session.decode([1], max_new_tokens=5)
    with first():
        child = session.fork(seed=3)
        child.decode([2], max_new_tokens=4)
    with later():
        child.rewind(child.mark(12))
        engine.decode_batch([session, child], [[3], [4]], max_new_tokens=5)
        session.save(folder / "saved")
    with first():
        loaded = engine.load_session(folder / "saved")
        loaded.decode([5], max_new_tokens=3)
        engine.park(loaded, "disk", directory=folder)
        loaded.next_logits()
    with later():
        loaded.decode([], max_new_tokens=4)
    ids = [*session.token_ids, *child.token_ids, *loaded.token_ids]
    for one in (session, child, loaded):
        one.close()
    return ids


@pytest.mark.parametrize(
    ("slow_step", "first", "later"), CALLERS, ids=["observe", "verify", "rectify"]
)
def test_a_session_is_the_same_whoever_calls(
    slow_step: SlowStepKind, first: Surroundings, later: Surroundings, tmp_path: Path
) -> None:
    expected = everything(nullcontext, nullcontext, slow_step, tmp_path / "plain")
    assert everything(first, later, slow_step, tmp_path / "set") == expected


def test_the_caller_finds_its_own_settings_again() -> None:
    with torch.inference_mode(), autocast():
        with own_surroundings(CPU):
            assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.zeros(1).is_inference()
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    with own_surroundings(CPU):
        assert torch.is_grad_enabled()
