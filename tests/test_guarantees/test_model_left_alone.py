"""Guarantee 7: nothing is patched at import, and a model is as it was when its sessions end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sfi_agent import Engine, ModelInUseError, Session, SessionConfig
from sfi_agent.engine import switch
from sfi_agent.engine.attention import ATTENTION_NAME
from tests.families import FAMILIES, build_model, model_of, tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.policies import FAMILY_NAMES

CONFIG = SessionConfig(boundaries=[{"name": "never"}])


def implementation(engine: Engine) -> str:
    name: str = engine.model.config._attn_implementation
    return name


@pytest.fixture
def engine() -> Engine:
    return Engine(build_model(FAMILIES[0]))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_logits_and_configuration_are_the_same_before_and_after(family: str) -> None:
    engine = tiny_engine(family)
    before, saved = implementation(engine), engine.model.config.to_dict()
    logits = dense_logits(engine.model, range(20))
    with engine.session(CONFIG) as session:
        assert implementation(engine) == ATTENTION_NAME
        session.decode([1, 2, 3], max_new_tokens=3)
    assert implementation(engine) == before
    assert engine.model.config.to_dict() == saved
    assert torch.equal(dense_logits(engine.model, range(20)), logits)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_implementation_that_was_set_comes_back(before: str) -> None:
    model = build_model(FAMILIES[0])
    model.set_attn_implementation(before)
    engine = Engine(model)
    assert implementation(engine) == before
    with engine.session(CONFIG) as session:
        session.decode([1], max_new_tokens=1)
    assert implementation(engine) == before


def test_a_session_that_was_never_used_switches_nothing_on(engine: Engine) -> None:
    session = engine.session(CONFIG)
    assert (session.status, implementation(engine)) == ("new", "sdpa")
    session.close()
    assert (session.status, implementation(engine)) == ("closed", "sdpa")


def test_the_last_of_several_sessions_and_engines_restores(engine: Engine) -> None:
    beside = Engine(engine.model)
    sessions = [
        engine.session(CONFIG),
        beside.session(CONFIG),
        Engine(engine.model).session(CONFIG),
    ]
    for session in sessions[:2]:
        session.decode([1, 2], max_new_tokens=1)
    # An engine made while sessions are open finds the model checked and switched.
    late = Engine(engine.model).session(CONFIG)
    late.decode([3], max_new_tokens=1)
    child = late.fork()
    for session in (*sessions, late):
        session.close()
        session.close()
    assert implementation(engine) == ATTENTION_NAME
    child.close()
    assert implementation(engine) == "sdpa"


def test_a_direct_call_is_refused_while_open_and_served_afterwards(engine: Engine) -> None:
    ids = torch.tensor([[1, 2, 3]])
    model: Any = engine.model
    with engine.session(CONFIG) as session:
        session.decode([5, 6], max_new_tokens=2)
        with pytest.raises(ModelInUseError, match="slow-fast sessions are open"):
            model(ids)
        with pytest.raises(ModelInUseError):
            model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        session.decode([], max_new_tokens=2)
        assert len(session.token_ids) == 6
    assert model(ids).logits.shape == (1, 3, 101)


class _Fails:
    """Raises in the n-th call of a method, then works again."""

    def __init__(self, call: Callable[..., Any], number: int) -> None:
        self.call = call
        self.left = number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("planned")
        return self.call(*arguments, **keywords)


@pytest.mark.parametrize("calls", [1, 2, 7, 10])
def test_an_exception_inside_a_step_restores_through_the_with_block(
    engine: Engine, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = engine.model
    layer = model.model.layers[1]
    monkeypatch.setattr(layer, "forward", _Fails(layer.forward, calls))
    with pytest.raises(ArithmeticError), engine.session(CONFIG) as session:
        session.decode([1, 2, 3], max_new_tokens=20)
    assert implementation(engine) == "sdpa"


@pytest.mark.parametrize("part", ["selector", "monitor"])
def test_an_exception_in_a_plugin_restores_through_the_with_block(
    engine: Engine, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.replace(memory={"recent_tokens": 2})
    with pytest.raises(ArithmeticError), engine.session(config) as session:
        plugin = getattr(session._core._decoder.steps, part)
        method = "select" if part == "selector" else "after_token"
        monkeypatch.setattr(plugin, method, _Fails(getattr(plugin, method), 1))
        session.decode(list(range(20)), max_new_tokens=20)
    assert implementation(engine) == "sdpa"


def test_a_session_that_is_lost_gives_the_model_back(engine: Engine) -> None:
    session = engine.session(CONFIG)
    session.decode([1, 2], max_new_tokens=2)
    assert implementation(engine) == ATTENTION_NAME
    del session
    gc.collect()
    assert implementation(engine) == "sdpa"


def test_a_session_may_be_collected_while_the_switch_is_locked(engine: Engine) -> None:
    """The garbage collector runs where it likes, also inside the switch; it must not wait."""

    def lose_a_session() -> None:
        cycle: dict[str, Any] = {"session": engine.session(CONFIG)}
        cycle["session"].decode([1], max_new_tokens=1)
        cycle["self"] = cycle

    def collect_under_lock() -> None:
        lose_a_session()
        with switch._switches_lock, switch.AttentionSwitch.of(engine.model)._lock:
            gc.collect()

    worker = threading.Thread(target=collect_under_lock, daemon=True)
    worker.start()
    worker.join(timeout=20)
    assert not worker.is_alive(), "the finaliser waits for a lock its own thread holds"
    assert implementation(engine) == "sdpa"


def test_opening_fails_cleanly_where_the_model_refuses_the_switch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ValueError(f"cannot take {name}")

    session: Session = engine.session(CONFIG)
    with monkeypatch.context() as patched:
        patched.setattr(engine.model, "set_attn_implementation", refuse)
        with pytest.raises(ValueError, match="cannot take"):
            session.decode([1], max_new_tokens=1)
    assert switch.AttentionSwitch.of(engine.model).users == 0
    assert len(session.decode([1], max_new_tokens=1)) == 1
    session.close()
    assert implementation(engine) == "sdpa"


def test_importing_registers_and_patches_nothing(child_python: Callable[..., str]) -> None:
    printed = child_python(
        """
        import torch, transformers
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers import PreTrainedModel
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        import torch.nn.functional as F

        def state():
            names = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
            return (names, F.scaled_dot_product_attention, torch.nn.Module.__call__,
                    PreTrainedModel.forward, PreTrainedModel.set_attn_implementation,
                    sorted(AttentionMaskInterface._global_mapping))

        before = state()
        import importlib, pkgutil, sfi_agent, sfi_policies, sfi_selectors
        for package in ("sfi_agent.engine", "sfi_agent.session", "sfi_agent.observe"):
            module = importlib.import_module(package)
            for found in pkgutil.iter_modules(module.__path__, package + "."):
                importlib.import_module(found.name)
        sfi_agent.load_plugins()
        print(before == state(), "sfi_agent" in before[0])
        """
    )
    assert printed.splitlines()[-1] == "True False"


def test_an_engine_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    attributes = set(vars(model))
    Engine(model)
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == "sdpa"
