"""The attention function: sliding bands, evidence rows, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import ModelInUseError, UnsupportedModelError
from sfi_agent.engine.attention import StepContext, slow_fast_attention
from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.sequence import SequenceState
from tests.test_engine.test_sdpa import by_the_book, draw

spread = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@spread
@given(
    blocks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 12)),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    forks=st.sets(st.integers(0, 5)),
)
def test_dense_steps_see_a_causal_band(
    blocks: list[int], window: int | None, heads: tuple[int, int], forks: set[int]
) -> None:
    """Blocks of any length over one or several extents, against an explicit mask."""
    total, dim = sum(blocks), 8
    query = draw(1, heads[0], total, dim, dtype=torch.float32)
    keys, values = (draw(n, heads[1], total, dim, dtype=torch.float32) for n in (2, 3))
    row, column = torch.arange(total)[:, None], torch.arange(total)[None]
    visible = column <= row
    if window is not None:
        visible &= column > row - window
    expected = by_the_book(query, keys, values, 0.4, visible)
    sequence = SequenceState((window,), None, frozenset())
    module: Any = SimpleNamespace(layer_idx=0)
    start, outs = 0, []
    for number, block in enumerate(blocks):
        if number in forks:
            child = SequenceState((window,), None, frozenset())
            sequence.share_history_with(child)
            sequence = child
        run = slice(start, start + block)
        parts = (query[None, :, run], keys[None, :, run], values[None, :, run])
        context = StepContext("dense", sequence)
        out, weights = slow_fast_attention(module, *parts, None, scaling=0.4, sfi=context)
        assert weights is None and out.shape == (1, block, heads[0], dim)
        outs.append(out[0].transpose(0, 1))
        start += block
    got = torch.cat(outs, dim=1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def make_inputs(rows: int = 3) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    module: Any = SimpleNamespace(layer_idx=0)
    parts = (draw(n, 1, 2, rows, 8, dtype=torch.float32) for n in range(3))
    return (module, *parts)


def test_evidence_rows_are_kept_as_a_copy_on_sparse_layers_only() -> None:
    layout = MemoryLayout(1, 4, 2, torch.device("cpu"))
    sequence = SequenceState((None, None, 4), layout, frozenset({1}))
    module, query, key, value = make_inputs(5)
    for layer in range(3):
        module.layer_idx = layer
        context = StepContext("dense", sequence, capture_rows=2)
        slow_fast_attention(module, query, key, value, None, sfi=context)
    captured = [layer.captured_query for layer in sequence.layers]
    assert captured[0] is not None and torch.equal(captured[0], query[0, :, -2:])
    assert captured[0].data_ptr() != query[0, :, -2:].data_ptr()
    assert captured[1] is None and captured[2] is None


def test_the_scale_defaults_to_the_head_size() -> None:
    sequence = SequenceState((None,), None, frozenset())
    module, query, key, value = make_inputs()
    slow_fast_attention(module, query, key, value, None, sfi=StepContext("dense", sequence))
    assert sequence.layers[0].rule.scale == 8**-0.5


def test_a_call_without_a_step_is_somebody_elses() -> None:
    with pytest.raises(ModelInUseError, match="close the sessions first"):
        slow_fast_attention(*make_inputs(), None, scaling=1.0)


@pytest.mark.parametrize("keyword", ["position_bias", "something_new"])
def test_keywords_that_would_change_the_result_are_refused_by_name(keyword: str) -> None:
    sequence = SequenceState((None,), None, frozenset())
    context = StepContext("dense", sequence)
    given: dict[str, Any] = {keyword: 1.0}
    with pytest.raises(UnsupportedModelError, match=keyword):
        slow_fast_attention(*make_inputs(), None, sfi=context, **given)
    assert sequence.layers[0].history.tokens == 0
    given[keyword] = None
    slow_fast_attention(*make_inputs(), None, sfi=context, **given)
    assert sequence.layers[0].history.tokens == 3
