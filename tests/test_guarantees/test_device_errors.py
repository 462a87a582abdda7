"""Numbers that are not finite, and devices that are full: typed errors, sessions that go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfi_agent import Engine, NumericsError, OutOfDeviceMemoryError, SfiError
from sfi_agent.observe.trace import SlowStepKind
from tests.families import FAMILIES, build_model, word_tokenizer
from tests.reference import dense_logits
from tests.test_engine.program_cases import POLICY, eager_engine
from tests.test_guarantees.play import close
from tests.test_guarantees.test_batch import ENGINES, PROMPTS, over_engines

PROMPT = PROMPTS[0]


def engine_on_damage(layer: int, part: str, **options: Any) -> Engine:
    """Damaged after the engine was made: the self-check would refuse the model."""
    model = build_model(FAMILIES[0])
    engine = Engine(model, word_tokenizer(), **options)
    with torch.no_grad():
        getattr(model.model.layers[layer].self_attn, part).weight[0, 0] = float("nan")
    return engine


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_damaged_layer_is_named_where_numbers_are_checked(layer: int, part: str) -> None:
    engine = engine_on_damage(layer, part, check_numbers=True)
    with engine.session(POLICY) as session:
        with pytest.raises(NumericsError, match=f"layer {layer} on a dense step") as caught:
            session.decode(PROMPT, max_new_tokens=3)
        assert caught.value.layer == layer
        assert isinstance(caught.value, SfiError) and isinstance(caught.value, ArithmeticError)
        assert session.token_ids == PROMPT and session.stats.history_tokens == 0


def test_nobody_looks_where_nobody_asked() -> None:
    engine = engine_on_damage(1, "v_proj")
    with engine.session(POLICY) as session:
        assert len(session.decode(PROMPT, max_new_tokens=3)) == 3


def test_damage_is_found_on_fast_steps_and_the_session_goes_on_before_it() -> None:
    """A history that is damaged later names the step; a rewind before it heals."""
    engine = Engine(build_model(FAMILIES[0]), word_tokenizer(), check_numbers=True)
    with engine.session(POLICY) as session:
        session.decode(PROMPT, max_new_tokens=12)
        sequence = session._core._opened().sequence
        sequence.layers[2].history.extents[0].buffer.values[:, 33:] = float("nan")
        with pytest.raises(NumericsError, match="rewind before it") as caught:
            session.decode([], max_new_tokens=12)
        assert caught.value.layer == 2
        session.rewind(session.mark(32))
        assert len(session.decode([], max_new_tokens=12)) == 12


def test_checked_numbers_that_are_finite_change_nothing() -> None:
    engine = Engine(build_model(FAMILIES[0]), word_tokenizer(), check_numbers=True)
    with engine.session(POLICY) as checked, eager_engine("llama").session(POLICY) as session:
        found, expected = (s.decode(PROMPT, max_new_tokens=20) for s in (checked, session))
    assert found == expected


class _Full:
    """Wraps a model's forward: the device is full in the n-th call, when layers have run."""

    def __init__(self, forward: Any, call: int) -> None:
        self.forward, self.left = forward, call

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        result = self.forward(*arguments, **keywords)
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return result


@over_engines
@pytest.mark.parametrize("call", [1, 2, 5, 12])
@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
def test_a_full_device_is_said_with_its_parts_and_the_session_goes_on(
    slow_step: SlowStepKind, call: int, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ENGINES[steps]("llama")
    config = POLICY.replace(slow_step=slow_step)
    attention = engine.model.model.layers[-1].self_attn
    with engine.session(config) as session:
        with monkeypatch.context() as patched:
            patched.setattr(attention, "forward", _Full(attention.forward, call))
            with pytest.raises(OutOfDeviceMemoryError) as caught:
                session.decode(PROMPT, max_new_tokens=20)
        parts, message = caught.value.parts, str(caught.value)
        weights = sum(parameter.nbytes for parameter in engine.model.parameters())
        assert parts["weights"] == weights and "histories of 1 sequences" in parts
        assert all(size >= 0 for size in parts.values())
        assert all(name in message for name in parts)
        assert "Tried to allocate 2.00 GiB" in message and "more" not in message.split(";")[1]
        assert "memory.selected_tokens" in message
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        ids = session.token_ids
        assert ids[: len(PROMPT)] == PROMPT
        assert session.stats.history_tokens < len(ids) or call == 1
        logits = session.next_logits()
        assert len(session.decode([], max_new_tokens=8)) == 8
    if slow_step != "observe":
        assert close(logits, dense_logits(engine.model, ids)[-1])


@over_engines
@pytest.mark.parametrize("call", [1, 4, 9])
def test_a_full_device_in_a_batch_leaves_every_session_usable(
    call: int, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ENGINES[steps]("llama")
    config = POLICY.replace(slow_step="verify")
    attention = engine.model.model.layers[-1].self_attn
    with (
        engine.session(config) as one,
        engine.session(config) as two,
        engine.session(config) as three,
    ):
        sessions = [one, two, three]
        with monkeypatch.context() as patched:
            patched.setattr(attention, "forward", _Full(attention.forward, call))
            with pytest.raises(OutOfDeviceMemoryError, match=r"histories of \d sequences"):
                engine.decode_batch(sessions, PROMPTS, max_new_tokens=20)
        left = [(session.token_ids, session.next_logits()) for session in sessions]
        assert [len(row) for row in engine.decode_batch(sessions, max_new_tokens=5)] == [5] * 3
    for ids, logits in left:
        assert close(logits, dense_logits(engine.model, ids)[-1])
