"""Every attention kernel against the plain float32 form, on fresh random inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent.engine import sdpa
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.history import Piece
from sfi_agent.engine.sdpa import (
    attend_history,
    attend_rows,
    lse_kernel,
    reference_attention,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 2e-5}

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
head_sizes = st.sampled_from([8, 16, 24, 40, 64, 80, 96, 128])
groupings = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)])
spread = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def draw(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(*shape, generator=generator)).to(dtype)


def by_the_book(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None
) -> Tensor:
    """Softmax attention in float64; keys and values repeated for grouped heads."""
    group = query.shape[0] // keys.shape[0]
    keys = keys.double().repeat_interleave(group, 0)
    values = values.double().repeat_interleave(group, 0)
    logits = torch.einsum("hqd,hkd->hqk", query.double(), keys) * scale
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,hkd->hqd", logits.softmax(-1), values)


def causal(rows: int, tokens: int) -> Tensor:
    return torch.arange(tokens)[None] <= torch.arange(tokens - rows, tokens)[:, None]


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=2 * tolerance)


@spread
@given(st.integers(0, 999), dtypes, head_sizes, st.integers(1, 5), st.integers(1, 67))
def test_the_reference_is_softmax_attention(
    seed: int, dtype: torch.dtype, dim: int, heads: int, tokens: int
) -> None:
    query, keys, values = (draw(seed + n, heads, tokens, dim, dtype=dtype) for n in range(3))
    for is_causal in (False, True):
        visible = causal(tokens, tokens) if is_causal else None
        out, lse = reference_attention(query, keys, values, 0.3, is_causal)
        assert_near(out, by_the_book(query, keys, values, 0.3, visible), dtype)
        logits = torch.einsum("hqd,hkd->hqk", query.double(), keys.double()) * 0.3
        if visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


@spread
@given(
    st.integers(0, 999),
    st.sampled_from(list(TOLERANCE)),
    head_sizes,
    st.integers(1, 4),
    st.integers(1, 130),
    st.integers(1, 40),
    st.booleans(),
)
def test_kernels_with_log_sum_exps(
    seed: int,
    dtype: torch.dtype,
    dim: int,
    heads: int,
    tokens: int,
    rows: int,
    is_causal: bool,
) -> None:
    rows = tokens if is_causal else rows
    # A view of a larger buffer, as the history hands it over.
    keys, values = (draw(seed + n, heads, tokens + 9, dim, dtype=dtype)[:, :tokens] for n in (1, 2))
    query = draw(seed, heads, rows, dim, dtype=dtype)
    kernel = lse_kernel(query, values)
    assert kernel is not reference_attention
    out, lse = kernel(query, keys, values, dim**-0.5, is_causal)
    expected, expected_lse = reference_attention(query, keys, values, dim**-0.5, is_causal)
    assert out.shape == query.shape
    assert lse.shape == query.shape[:2] and lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)
    assert_near(out, expected.double(), dtype)


@spread
@given(st.integers(0, 999), dtypes, head_sizes, groupings, st.integers(1, 90), st.integers(1, 9))
def test_rows_that_see_everything(
    seed: int, dtype: torch.dtype, dim: int, heads: tuple[int, int], tokens: int, rows: int
) -> None:
    query_heads, kv_heads = heads
    query = draw(seed, query_heads, rows, dim, dtype=dtype)
    keys, values = (draw(seed + n, kv_heads, tokens, dim, dtype=dtype) for n in (1, 2))
    got = attend_rows(query, keys, values, AttentionRule(0.2))
    assert_near(got, by_the_book(query, keys, values, 0.2), dtype)


@spread
@given(
    st.integers(0, 999),
    dtypes,
    head_sizes,
    groupings,
    st.lists(st.integers(1, 45), min_size=1, max_size=4),
    st.integers(1, 45),
)
def test_a_history_in_pieces_is_one_softmax(
    seed: int,
    dtype: torch.dtype,
    dim: int,
    heads: tuple[int, int],
    lengths: list[int],
    rows: int,
) -> None:
    """Blocks of rows are causal among themselves; pieces merge by their log-sum-exps."""
    rows = min(rows, lengths[-1])
    tokens = sum(lengths)
    query = draw(seed, heads[0], rows, dim, dtype=dtype)
    keys, values = (draw(seed + n, heads[1], tokens, dim, dtype=dtype) for n in (1, 2))
    pieces, start = [], 0
    for length in lengths:
        run = slice(start, start + length)
        pieces.append(Piece(start, keys[:, run], values[:, run]))
        start += length
    got = attend_history(query, pieces, AttentionRule(dim**-0.5))
    expected = by_the_book(query, keys, values, dim**-0.5, causal(rows, tokens))
    assert_near(got, expected, dtype)


def test_extreme_logits_do_not_overflow() -> None:
    query, keys, values = (draw(n, 2, 6, 16, dtype=torch.float32) for n in range(3))
    pieces = [
        Piece(0, keys[:, :3] * 100, values[:, :3]),
        Piece(3, keys[:, 3:] * 100, values[:, 3:]),
    ]
    got = attend_history(query[:, :2], pieces, AttentionRule(1.0))
    expected = by_the_book(query[:, :2], keys * 100, values, 1.0, causal(2, 6))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype", "key_dim", "value_dim", "fast"),
    [
        ("cpu", torch.float32, 16, 16, True),
        ("cpu", torch.float32, 24, 16, False),
        ("cuda", torch.bfloat16, 128, 128, True),
        ("cuda", torch.bfloat16, 12, 12, False),
        ("cuda", torch.bfloat16, 512, 512, False),
        ("cuda", torch.float32, 12, 12, True),
        ("cuda", torch.float32, 10, 10, False),
        ("cuda", torch.float64, 64, 64, False),
        ("mps", torch.float32, 64, 64, False),
    ],
)
def test_what_no_kernel_takes_goes_to_the_reference_with_a_reason(
    device: str, dtype: torch.dtype, key_dim: int, value_dim: int, fast: bool
) -> None:
    kernel, reason = sdpa._choose_kernel(device, dtype, key_dim, value_dim)
    assert (kernel is not reference_attention) == fast
    assert reason


def test_values_of_another_size_than_keys() -> None:
    query, keys = (draw(n, 4, 5, 24, dtype=torch.float32) for n in range(2))
    values: Any = draw(2, 4, 5, 16, dtype=torch.float32)
    pieces = [Piece(0, keys[:, :2], values[:, :2]), Piece(2, keys[:, 2:], values[:, 2:])]
    got = attend_history(query[:, :3], pieces, AttentionRule(0.2))
    assert_near(got, by_the_book(query[:, :3], keys, values, 0.2, causal(3, 5)), torch.float32)
