"""Guarantee 8: bad input is a typed error before any compute, and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from sfi_agent import (
    ConfigError,
    ContextOverflowError,
    Engine,
    InputError,
    NothingPendingError,
    SessionConfig,
    SessionStateError,
    UnsupportedModelError,
)
from tests.families import CONTEXT_TOKENS, FAMILIES, VOCABULARY, build_model, tiny_engine

CONFIG = SessionConfig(boundaries=[{"name": "never"}])


def refuse_to_compute(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(engine.runner.model, "forward", forward)


BAD_IDS: tuple[Any, ...] = (
    [VOCABULARY],
    [-1],
    [3, 4, 2.0],
    [True],
    ["5"],
    "hello",
    [[1, 2]],
    None,
    7,
    {"input_ids": [1, 2]},
    torch.tensor(5),
    torch.tensor([[1, 2]]),
    torch.tensor([1.0, 2.0]),
    numpy.array([[1, 2]]),
    [None],
)


@pytest.mark.parametrize("ids", BAD_IDS, ids=repr)
def test_unusable_ids(ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama")
    with engine.session(CONFIG) as session:
        session.decode([1, 2], max_new_tokens=2)
        before = session.token_ids
        with monkeypatch.context() as patched:
            refuse_to_compute(engine, patched)
            with pytest.raises(InputError, match=f"got .*allowed: .* 0 to {VOCABULARY - 1}"):
                session.decode(ids, max_new_tokens=2)
        assert session.token_ids == before
        assert len(session.decode([], max_new_tokens=2)) == 2


@pytest.mark.parametrize("ids", [torch.tensor([1, 2]), numpy.array([1, 2]), (1, 2), range(1, 3)])
def test_any_flat_sequence_of_integers_will_do(ids: Any) -> None:
    with tiny_engine("llama").session(CONFIG) as session:
        session.decode(ids, max_new_tokens=0)
        assert session.token_ids == [1, 2]


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"max_new_tokens": "8"},
        {"stop_ids": 5},
        {"stop_ids": ["5"]},
        {"stop_ids": [[5]]},
        {"stop_ids": [True]},
        {"stop_ids": None},
        {"stop_ids": "5"},
    ],
    ids=repr,
)
def test_unusable_limits(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama")
    with engine.session(CONFIG) as session:
        session.decode([1, 2], max_new_tokens=2)
        before = session.token_ids
        with monkeypatch.context() as patched:
            refuse_to_compute(engine, patched)
            with pytest.raises(InputError, match="got .*allowed"):
                session.decode([3], **keywords)
        assert session.token_ids == before


def test_more_than_the_context_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama")
    with engine.session(CONFIG) as session:
        session.decode([1, 2], max_new_tokens=2)
        with monkeypatch.context() as patched:
            refuse_to_compute(engine, patched)
            for new, room in ((CONTEXT_TOKENS, 0), (1, CONTEXT_TOKENS), (500, 9)):
                with pytest.raises(ContextOverflowError, match=str(CONTEXT_TOKENS)) as caught:
                    session.decode([5] * new, max_new_tokens=room)
                assert caught.value.needed_tokens == 4 + new + room
                assert caught.value.limit_tokens == CONTEXT_TOKENS
        assert len(session.token_ids) == 4
        session.decode([5] * 500, max_new_tokens=CONTEXT_TOKENS - 504)
        assert len(session.token_ids) == CONTEXT_TOKENS


def test_nothing_to_continue_from() -> None:
    with tiny_engine("llama").session(CONFIG) as session:
        with pytest.raises(NothingPendingError):
            session.decode([])
        with pytest.raises(NothingPendingError):
            session.next_logits()
        session.decode([1], max_new_tokens=1)
        session.rewind(session.mark(0))
        with pytest.raises(NothingPendingError):
            session.decode([])


def test_a_closed_session() -> None:
    session = tiny_engine("llama").session(CONFIG)
    session.decode([1], max_new_tokens=1)
    mark = session.mark()
    session.close()
    uses: list[Callable[[], object]] = [
        lambda: session.decode([1]),
        lambda: session.next_logits(),
        lambda: session.mark(),
        lambda: session.rewind(mark),
        lambda: session.fork(),
        lambda: session.__enter__(),
    ]
    for use in uses:
        with pytest.raises(SessionStateError, match="closed"):
            use()
    assert session.status == "closed"
    assert session.token_ids == []


@pytest.mark.parametrize("layers", [(3,), (0, 7)])
def test_dense_layers_that_the_model_lacks(layers: tuple[int, ...]) -> None:
    engine = tiny_engine("llama")
    config = CONFIG.replace(memory={"dense_layers": layers})
    with pytest.raises(ConfigError, match=rf"dense_layers.*\[{layers[-1]}\].*0 to 2"):
        engine.session(config)
    with engine.session(CONFIG) as session, pytest.raises(ConfigError, match="dense_layers"):
        session.fork(config)


@pytest.mark.parametrize("config", [{"mode": "dense"}, "dense", SessionConfig])
def test_something_that_is_not_a_configuration(config: Any) -> None:
    engine = tiny_engine("llama")
    with pytest.raises(ConfigError, match="allowed: a SessionConfig"):
        engine.session(config)
    with engine.session(CONFIG) as session, pytest.raises(ConfigError):
        session.fork(config)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL: dict[str, Any] = {
    key: _SHAPE[key]
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
} | {"bos_token_id": 1, "eos_token_id": 2}

UNSUPPORTED: tuple[tuple[str, dict[str, Any], str], ...] = (
    (
        "Qwen3Next",
        _SHAPE
        | {
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["full_attention", "linear_attention"],
        },
        "layer 1 of kind 'linear_attention'",
    ),
    ("Falcon", _SMALL, "does not use transformers' attention interface"),
    ("Bloom", _SMALL, "does not use transformers' attention interface"),
    ("StableLm", _SHAPE, "does not hand keywords"),
    (
        "Llama",
        _SHAPE
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "rotary scaling 'dynamic'",
    ),
)


@pytest.mark.parametrize(
    ("architecture", "options", "reason"), UNSUPPORTED, ids=lambda value: value
)
def test_models_that_cannot_be_decoded(
    architecture: str, options: dict[str, Any], reason: str
) -> None:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**options)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError) as caught:
        Engine(model)
    assert reason in str(caught.value)
    assert model.config._attn_implementation == before


def test_a_model_in_training_mode() -> None:
    with pytest.raises(UnsupportedModelError, match=r"training mode.*model\.eval"):
        Engine(build_model(FAMILIES[0]).train())
