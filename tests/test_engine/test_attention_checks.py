"""What attention refuses while a step runs, and what it says of numbers that are not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfi_agent import Engine, NumericsError, SessionConfig, UnsupportedModelError
from sfi_agent.engine.attention import StepContext, slow_fast_attention
from sfi_agent.engine.attention_checks import check_finite, check_logits
from sfi_agent.engine.sequence import SequenceState
from tests.families import FAMILIES, build_model

NAN, INFINITY = float("nan"), float("inf")


def attended(
    module: dict[str, Any],
    mask: Any = None,
    *,
    windows: tuple[int | None, ...] = (5,),
    **given: Any,
) -> tuple[torch.Tensor, SequenceState]:
    sequence = SequenceState(windows, None, frozenset())
    generator = torch.Generator().manual_seed(1)
    query, keys, values = torch.randn(3, 1, 2, 4, 8, generator=generator)
    layer: Any = SimpleNamespace(layer_idx=0, **module)
    context = StepContext("dense", sequence)
    out, _ = slow_fast_attention(layer, query, keys, values, mask, sfi=context, **given)
    return out, sequence


@pytest.mark.parametrize(
    ("module", "given", "named"),
    [
        ({}, {"mask": torch.zeros(1, 1, 4, 4)}, r"a mask of its own, \(1, 1, 4, 4\)"),
        ({"is_causal": False}, {}, "later tokens"),
        ({"is_causal": True}, {"is_causal": False}, "later tokens"),
        ({}, {"is_causal": False}, "later tokens"),
        ({}, {"sliding_window": 6}, "window of 6 tokens where the configuration says 5"),
        ({}, {"sliding_window": 6, "windows": (None,)}, "configuration says None"),
    ],
    ids=str,
)
def test_a_layer_that_sees_other_tokens_is_refused(
    module: dict[str, Any], given: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        attended(module, **given)


@pytest.mark.parametrize(
    ("module", "given"),
    [
        ({}, {}),
        ({"is_causal": True}, {"sliding_window": 5}),
        ({"is_causal": False}, {"is_causal": True, "sliding_window": None}),
        ({"is_causal": None}, {"is_causal": None}),
    ],
    ids=str,
)
def test_a_layer_that_says_no_more_than_we_know_is_not(
    module: dict[str, Any], given: dict[str, Any]
) -> None:
    out, sequence = attended(module, **given)
    # Some families take a view of it, as transformers' own attention lets them.
    assert out.view(1, 4, -1).shape == (1, 4, 16)
    assert sequence.layers[0].history.tokens == 4


def test_a_model_that_looks_ahead_is_refused_however_little_that_changes() -> None:
    """With weights as small as these the self-check's logits agree to four digits."""
    from transformers import BertConfig, BertLMHeadModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    for decoder in (True, False):
        config = BertConfig(vocab_size=97, num_hidden_layers=2, is_decoder=decoder, **sizes)
        model = BertLMHeadModel(config).eval()
        if decoder:
            assert Engine(model).shape.num_layers == 2
            continue
        with pytest.raises(UnsupportedModelError, match="attention to later tokens"):
            Engine(model)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_query_that_is_not_finite_is_found_where_the_output_hides_it(value: float) -> None:
    fine, bad = torch.ones(2, 1, 8), torch.ones(2, 1, 8)
    bad[1, 0, 3] = value
    check_finite("fast", 2, 40, fine, {"query": fine, "keys": fine})
    with pytest.raises(NumericsError, match="layer 2 on a fast step at position 40") as caught:
        check_finite("fast", 2, 40, fine, {"query": bad, "keys": fine, "values": bad})
    assert "query and values that are not finite" in str(caught.value)
    with pytest.raises(NumericsError, match="from a finite new token"):
        check_finite("fast", 2, 40, bad, {"query": fine})


def test_logits_may_be_minus_infinity_and_nothing_else() -> None:
    logits = torch.zeros(1, 2, 9)
    logits[0, 1, 4] = -INFINITY
    check_logits(logits, 7)
    for value in (NAN, INFINITY):
        logits[0, 0, 2] = value
        with pytest.raises(NumericsError, match="position 7") as caught:
            check_logits(logits, 7)
        assert caught.value.layer is None


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize(
    "part",
    [
        "lm_head",
        "model.norm",
        "model.layers.2.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.self_attn.q_proj",
    ],
)
def test_damage_behind_the_last_attention_is_found_too(part: str, value: float) -> None:
    model = build_model(FAMILIES[0])
    engine = Engine(model, check_numbers=True)
    with torch.no_grad():
        model.get_submodule(part).weight.view(-1)[0] = value
    with engine.session(SessionConfig(boundaries=[{"name": "never"}])) as session:
        with pytest.raises(NumericsError, match="at position 0") as caught:
            session.decode(list(range(12)), max_new_tokens=3)
        assert caught.value.layer == (2 if part.endswith("q_proj") else None)
        assert session.stats.history_tokens == 0 and len(session.token_ids) == 12
