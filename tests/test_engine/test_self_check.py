"""The self-check refuses a model whose attention is computed differently from ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfi_agent import Engine, UnsupportedModelError
from sfi_agent.engine import attention, sdpa
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.memory import LayerMemory
from sfi_agent.engine.model_shape import inspect_model
from sfi_agent.engine.sdpa import attend_rows
from sfi_agent.engine.self_check import check_model
from tests.families import FAMILIES, build_model

FAMILY = FAMILIES[0]


def refused(model: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_error_of_supported_families_is_rounding(family: Any) -> None:
    model = build_model(family, seed=3)
    assert check_model(model, inspect_model(model)) < 1e-4


def test_a_wrong_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.slow_fast_attention

    def scaled(*arguments: Any, scaling: float, **keywords: Any) -> Any:
        return original(*arguments, scaling=1.1 * scaling, **keywords)

    monkeypatch.setattr(attention, "slow_fast_attention", scaled)
    refused(build_model(FAMILY), "relative error")


def test_a_wrong_fast_step_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill chunks are right; only the memory forgets its newest token."""

    def forgetful(self: LayerMemory, query: Tensor, rule: AttentionRule) -> Tensor:
        assert self.common_start is not None
        seen = slice(self.common_start, self.layout.end)
        return attend_rows(query, self.keys[:, seen], self.values[:, seen], rule)

    monkeypatch.setattr(LayerMemory, "attend", forgetful)
    refused(build_model(FAMILY), "relative error")


def test_a_wrong_second_chunk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a chunk sees the first keys instead of all before it."""
    original = sdpa.attend_history

    def first_keys(query: Tensor, pieces: Any, rule: AttentionRule, **options: Any) -> Tensor:
        if query.shape[1] > 1 and pieces[-1].keys.shape[1] > query.shape[1]:
            rows = query.shape[1]
            piece = pieces[-1]
            cut = type(piece)(0, piece.keys[:, :rows], piece.values[:, :rows])
            return original(query, [cut], rule)
        return original(query, pieces, rule)

    monkeypatch.setattr(attention, "attend_history", first_keys)
    refused(build_model(FAMILY), "relative error")


def test_a_wrong_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(next(family for family in FAMILIES if family.name == "mistral_sliding"))
    model.config.sliding_window = 4
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 7
    # The model's own mask is built from the configuration; ours takes the same number.
    Engine(model)
    shape = inspect_model(model)
    model.config.sliding_window = 6
    with pytest.raises(UnsupportedModelError, match="window of 6 tokens where .* says 4"):
        check_model(model, shape)
    handed = attention.slow_fast_attention

    def silent(*arguments: Any, sliding_window: int | None, **keywords: Any) -> Any:
        return handed(*arguments, **keywords)

    monkeypatch.setattr(attention, "slow_fast_attention", silent)
    with pytest.raises(UnsupportedModelError, match="relative error"):
        check_model(model, shape)


def test_a_model_that_is_not_a_number_is_refused() -> None:
    model = build_model(FAMILY)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    refused(model, "relative error of nan")


def test_a_layer_that_never_asks_for_attention_is_named() -> None:
    model = build_model(FAMILY)
    own: Callable[..., Any] = model.model.layers[1].self_attn.forward

    def silent(hidden_states: Tensor, **keywords: Any) -> Any:
        if "sfi" not in keywords:
            return own(hidden_states=hidden_states, **keywords)
        return torch.zeros_like(hidden_states), None

    model.model.layers[1].self_attn.forward = silent
    refused(model, "layer 1 with 0 keys after 13 tokens")


def test_an_error_of_the_model_under_our_attention_is_wrapped() -> None:
    model = build_model(FAMILY)
    own: Callable[..., Any] = model.model.layers[1].self_attn.forward

    def breaks(hidden_states: Tensor, **keywords: Any) -> Any:
        if "sfi" in keywords:
            raise KeyError("something")
        return own(hidden_states=hidden_states, **keywords)

    model.model.layers[1].self_attn.forward = breaks
    refused(model, "KeyError: 'something'")


def test_a_model_that_gives_no_logits_is_refused() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    refused(LlamaModel(config).eval(), "LlamaModel as it is.*AutoModelForCausalLM")


def test_what_wraps_a_model_is_refused_with_where_the_model_is() -> None:
    compiled: Any = torch.compile(build_model(FAMILY), backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule.*_orig_mod"):
        Engine(compiled)


def test_a_soft_cap_that_the_models_own_attention_drops_is_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in older versions of transformers; the model is left with the attention that it had."""
    model = build_model(next(family for family in FAMILIES if family.name == "gemma2"))
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    model.set_attn_implementation("sdpa")
    error = check_model(model, inspect_model(model))
    assert error < 1e-4 and model.config._attn_implementation == "sdpa"
