"""The compiled CPU kernels against plain arithmetic, and what happens where there are none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sfi_agent.engine import cpu_rows, refresh
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.cpu_rows import RowKernels, row_kernels
from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.memory import LayerMemory, MemoryLayout
from sfi_agent.engine.refresh import layer_evidence
from sfi_agent.engine.sdpa import attend_rows
from sfi_agent.engine.sequence import LayerState

SIZES = [(1, 64, 64, 513), (2, 128, 128, 3001), (3, 96, 80, 1025), (8, 256, 64, 20011)]
BFLOAT16 = torch.bfloat16
needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("cc")), reason="needs a C compiler"
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BFLOAT16)


def inputs(rows: int, key_dim: int, value_dim: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values are slices of longer buffers, as histories and memories are."""
    keys, values = drawn(1, 2, tokens + 9, key_dim), drawn(2, 2, tokens + 9, value_dim)
    return drawn(3, 2, rows, key_dim), keys[:, 4 : 4 + tokens], values[:, 4 : 4 + tokens]


def built(query: Tensor, keys: Tensor, values: Tensor) -> RowKernels:
    kernels = row_kernels(query, keys, values)
    assert kernels is not None
    return kernels


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@needs_compiler
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_logits_are_float32_products(sizes: tuple[int, int, int, int], softcap: float) -> None:
    query, keys, values = inputs(*sizes)
    room = torch.full((2, sizes[0], sizes[3] + 7), 5.0)
    built(query, keys, values).logits(query, keys, 0.3, room[..., 5:-2], softcap)
    expected = capped(0.3 * query.double() @ keys.double().transpose(1, 2), softcap)
    torch.testing.assert_close(room[..., 5:-2].double(), expected, rtol=1e-5, atol=3e-5)
    assert bool((room[..., :5] == 5.0).all() and (room[..., -2:] == 5.0).all())


@needs_compiler
@pytest.mark.parametrize(("scale", "softcap"), [(0.1, 0.0), (3.0, 0.0), (3.0, 5.0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_rounded_once(
    sizes: tuple[int, int, int, int], scale: float, softcap: float
) -> None:
    query, keys, values = inputs(*sizes)
    out = built(query, keys, values).attend(query, keys, values, scale, softcap)
    logits = capped(scale * query.double() @ keys.double().transpose(1, 2), softcap)
    expected = logits.softmax(-1) @ values.double()
    assert out.dtype == BFLOAT16
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_equal_keys_give_equal_bits_and_threads_change_nothing(softcap: float) -> None:
    query, keys, values = inputs(2, 128, 128, 5000)
    kernels = built(query, keys, values)
    same = keys[:, :1].expand(-1, 5000, -1).contiguous()
    logits = torch.empty(2, 2, 5000)
    kernels.logits(query, same, 0.3, logits, softcap)
    assert bool((logits == logits[..., :1]).all())
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(kernels.attend(query, keys, values, 0.3, softcap))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@needs_compiler
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_what_is_no_number_stays_visible(softcap: float) -> None:
    query, keys, values = inputs(2, 64, 64, 600)
    query[1, 0, 3] = float("nan")
    out = built(query, keys, values).attend(query, keys, values, 0.3, softcap)
    assert bool(out[1, 0].isnan().all()) and not bool(out[0].isnan().any())


def test_other_tensors_are_left_to_torch() -> None:
    query, keys, values = inputs(2, 64, 64, 600)
    assert row_kernels(query.float(), keys.float(), values.float()) is None
    assert row_kernels(query, keys[:, :400], values[:, :400]) is None
    assert row_kernels(query[..., :40], keys[..., :40], values) is None
    assert row_kernels(drawn(1, 2, 9, 64), keys, values) is None
    assert row_kernels(drawn(1, 2, 2, 24), drawn(1, 2, 600, 24), values) is None


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(cpu_rows, "log_event", lambda *names, **values: events.append(values))
    cpu_rows._built.cache_clear()
    yield events
    cpu_rows._built.cache_clear()


def test_without_a_compiler_torch_answers_and_the_reason_is_logged_once(
    no_compiler: list[dict[str, Any]],
) -> None:
    query, keys, values = inputs(2, 64, 64, 700)
    for _ in range(2):
        out = attend_rows(query.view(4, 1, 64), keys, values, AttentionRule(0.3))
    expected = (0.3 * query.double() @ keys.double().transpose(1, 2)).softmax(-1) @ values.double()
    torch.testing.assert_close(out.view(2, 2, 64).double(), expected, rtol=2e-2, atol=2e-2)
    assert [event["reason"] for event in no_compiler] == ["no C compiler (gcc or cc) on the path"]


def test_a_kernel_that_errs_is_not_used() -> None:
    class _Wrong(RowKernels):
        def __init__(self, *_: object) -> None: ...

        def logits(
            self, query: Tensor, keys: Tensor, scale: float, out: Tensor, softcap: float = 0.0
        ) -> None:
            out.zero_()

        def attend(
            self, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0
        ) -> Tensor:
            return torch.zeros(*query.shape[:2], values.shape[-1])

    with pytest.raises(RuntimeError, match="differ from torch's"):
        cpu_rows._check(_Wrong(), rows=2, key_dim=64, value_dim=64)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("queries", [1, 2, 20])
@pytest.mark.parametrize("cuts", [[], [900], [130, 2500]])
def test_evidence_in_half_precision_is_float32(
    cuts: list[int], queries: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several extents, with and without the kernels, future tokens hidden from each query."""
    if not compiled:
        monkeypatch.setattr(refresh, "row_kernels", lambda *_: None)
    tokens, heads, group, dim = 3000, 2, 2, 64
    keys, history = drawn(8, heads, tokens, dim), LayerHistory()
    for start, end in zip([0, *cuts], [*cuts, tokens], strict=True):
        history = history.fork() if start else history
        history.append(keys[:, start:end], keys[:, start:end])
    query, layout = drawn(9, heads * group, queries, dim), MemoryLayout(4, 64, 30, keys.device)
    layer = LayerState(history, None, LayerMemory(layout), query, AttentionRule(0.2))
    evidence = layer_evidence(layer, layout.plan(tokens), with_norms=False)
    rows = query.view(heads, group, queries, dim).transpose(1, 2).flatten(1, 2)
    exact = 0.2 * rows.double() @ keys.double().transpose(1, 2)
    newest = tokens - queries + torch.arange(queries).repeat_interleave(group)
    exact = exact.masked_fill(torch.arange(tokens) > newest[:, None], float("-inf"))
    torch.testing.assert_close(
        evidence.logits[0].double(), exact[..., 4:2970], rtol=1e-5, atol=3e-5
    )
    rest = 1.0 - exact.softmax(-1)[..., 4:2970].sum(-1)
    torch.testing.assert_close(evidence.rest_mass[0].double(), rest, rtol=1e-4, atol=1e-6)
