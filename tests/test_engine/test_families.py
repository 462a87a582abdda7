"""The test models and the reference themselves: they must be able to tell right from wrong."""

from __future__ import annotations

import pytest
import torch

from tests.families import FAMILIES, FULL_ATTENTION, Family, build_model, model_of, tiny_engine
from tests.reference import VisibilityRules, dense_logits, masked_run, visibility_masks
from tests.test_guarantees.play import close

IDS = [token * 7 % 101 for token in range(40)]


def rules(family: Family, **changes: int) -> VisibilityRules:
    engine = tiny_engine(family.name)
    config = engine.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    sizes = {"sink_tokens": 0, "recent_tokens": 1, **changes}
    return VisibilityRules(
        **sizes, windows=engine.shape.windows, dense_layers=frozenset(), kv_heads=heads
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_engine_finds_the_layers_that_can_be_sparse(family: Family) -> None:
    windows = tiny_engine(family.name).shape.windows
    sparse = tuple(index for index, window in enumerate(windows) if window is None)
    assert sparse == family.sparse_layers


def test_the_head_sizes_that_kernels_treat_differently_are_among_them() -> None:
    sizes = set()
    for family in FAMILIES:
        config = model_of(family.name).config
        sizes.add(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
    assert {8, 16, 64, 96, 128} <= sizes


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_reference_without_fast_rows_is_the_model_itself(family: Family) -> None:
    model = model_of(family.name)
    masks = visibility_masks(rules(family), len(IDS), [], [])
    run = masked_run(model, IDS, masks)
    assert close(run.logits, dense_logits(model, IDS), tolerance=1e-5)
    assert len(run.keys) == len(masks)


@pytest.mark.parametrize("family", FULL_ATTENTION, ids=lambda family: family.name)
def test_hiding_ten_positions_is_noticed(family: Family) -> None:
    model = model_of(family.name)
    masks = visibility_masks(rules(family), len(IDS), [], [])
    whole = masked_run(model, IDS, masks).logits[-1]
    for layer in family.sparse_layers:
        masks[layer][:, -1, 10:20] = False
    assert not close(masked_run(model, IDS, masks).logits[-1], whole, tolerance=1e-3)


def test_models_are_equal_for_equal_seeds_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (build_model(FAMILIES[0], seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(dense_logits(first, IDS), dense_logits(second, IDS))
    assert not torch.equal(dense_logits(first, IDS), dense_logits(other, IDS))
