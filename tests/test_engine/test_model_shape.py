"""What is read from a model's configuration, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfi_agent import Engine, UnsupportedModelError
from sfi_agent.engine.model_shape import inspect_model
from tests.families import CONTEXT_TOKENS, FAMILIES, VOCABULARY, build_model, model_of

BY_NAME = {family.name: family for family in FAMILIES}


def with_config(**changes: Any) -> Any:
    """A Llama whose configuration says something else than its weights."""
    model = build_model(BY_NAME["llama"])
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def test_a_shape() -> None:
    shape = inspect_model(model_of("gemma3"))
    assert shape.windows == (7, None, 7, None)
    assert shape.num_layers == 4
    assert shape.context_limit_tokens == CONTEXT_TOKENS
    assert shape.vocabulary_size == VOCABULARY
    assert shape.device == torch.device("cpu")
    assert shape.dtype == torch.float32


def test_windows_of_a_family_without_layer_types() -> None:
    assert getattr(model_of("mistral_sliding").config, "layer_types", None) is None
    assert inspect_model(model_of("mistral_sliding")).windows == (7, 7)
    assert inspect_model(model_of("mistral")).windows == (None, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rotary scaling 'dynamic'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            "rotary scaling 'dynamic'",
        ),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer 1"),
        ({"layer_types": ["linear_attention"] * 3}, "'linear_attention'"),
    ],
    ids=str,
)
def test_features_that_cannot_be_reproduced_are_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        inspect_model(with_config(**changes))
    assert named in str(caught.value)
    assert "allowed" in str(caught.value)


def test_several_reasons_are_named_together() -> None:
    model = with_config(use_bidirectional_attention=True, num_kv_shared_layers=1)
    with pytest.raises(UnsupportedModelError, match="num_kv_shared_layers.*bidirectional"):
        inspect_model(model)


def test_weights_in_several_places() -> None:
    model = build_model(BY_NAME["llama"])
    model.model.layers[0].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"weights on \['cpu', 'meta'\]"):
        inspect_model(model)


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "default"}, CONTEXT_TOKENS),
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, CONTEXT_TOKENS),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 64),
        ({"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 9}}, 9),
    ],
    ids=str,
)
def test_the_context_ends_where_frequencies_would_change(
    scaling: dict[str, Any], limit: int
) -> None:
    assert inspect_model(with_config(rope_parameters=scaling)).context_limit_tokens == limit


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_half_precision_models_pass_their_check(family: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        engine = Engine(build_model(BY_NAME[family], dtype=dtype))
        assert engine.shape.dtype == dtype
        with engine.session() if engine.tokenizer else engine.session(_dense()) as session:
            assert len(session.decode([1, 2, 3], max_new_tokens=4)) == 4
            assert session.next_logits().dtype == torch.float32


def _dense() -> Any:
    from sfi_agent import SessionConfig

    return SessionConfig(mode="dense")
