"""The shared arithmetic of the selectors: ordered keys, sliding maxima, sums over rows."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_selectors._evidence import log_sum_rows
from sfi_selectors._ranking import choose, ordered_bits, ranking_keys, sliding_maximum

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, -0.0, -math.inf, 1e-45, -1e-45, 3.4028234663852886e38]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(FLOATS, min_size=1, max_size=60), data=st.data())
def test_choose_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values).reshape(1, 1, -1)
    order = sorted(range(len(values)), key=lambda k: -scores[0, 0, k].item())
    selection = choose(ranking_keys(scores), budget, start=7)
    assert selection.positions[0, 0].tolist() == sorted(k + 7 for k in order[:budget])


def test_neighbouring_floats_keep_their_order() -> None:
    values = torch.tensor([-3.0, -1e-30, 0.0, 1e-30, 3.0]).repeat_interleave(2)
    values[1::2] = values[1::2].nextafter(torch.tensor(torch.inf))
    bits = ordered_bits(values)
    assert (bits[1:] > bits[:-1]).all()
    assert (bits[1::2] - bits[::2] == 1).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(-9, 9), min_size=1, max_size=40),
    radius=st.integers(0, 50),
    integer=st.booleans(),
)
def test_sliding_maximum(values: list[int], radius: int, integer: bool) -> None:
    tensor = torch.tensor(values, dtype=torch.int64 if integer else torch.float32)
    expected = [max(values[max(0, k - radius) : k + radius + 1]) for k in range(len(values))]
    assert sliding_maximum(tensor, radius).tolist() == expected


def test_log_sum_rows_is_exact_to_float32_and_keeps_its_input() -> None:
    values = torch.randn((2, 3, 37, 50), generator=torch.Generator().manual_seed(0)) * 20
    values[0, 0, :, 3] = -torch.inf
    values[0, 1, 5] = -torch.inf
    before = values.clone()
    computed = log_sum_rows(values)
    assert torch.equal(values, before)
    assert computed[0, 0, 3] == -torch.inf
    torch.testing.assert_close(computed, values.double().logsumexp(dim=-2).float())


def test_equal_columns_have_bit_equal_sums() -> None:
    """The reason why no library reduction is used: its loops treat the last columns differently."""
    for rows in (2, 5, 16, 37):
        column = torch.randn((1, rows, 1), generator=torch.Generator().manual_seed(rows))
        for candidates in (3, 17, 64, 101):
            sums = log_sum_rows(column.expand(1, rows, candidates).contiguous())
            assert (sums == sums[..., :1]).all()
