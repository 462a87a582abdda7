"""The step kernels on a CUDA device: equality with the reference, capture, compilation."""

from __future__ import annotations

import random

import pytest
import torch

from sfi_agent.engine.kernels import (
    AttentionOptions,
    ExtentTable,
    attend,
    device_limits,
    kernel_problem,
    plan_attention,
)
from sfi_agent.engine.kernels.reference import ReferenceCall, reference_attend
from tests.test_engine.fused_cases import check_fused_selection
from tests.test_engine.kernel_cases import (
    attention_case,
    check_attention,
    check_compiled,
    check_flush,
    check_selection,
    copy_places,
    draw,
    extents_of,
    refresh_case,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = torch.device("cuda")


def test_this_device_has_kernels() -> None:
    assert kernel_problem(DEVICE, torch.bfloat16, 128, 128) is None


@pytest.mark.parametrize("seed", range(40))
def test_attention_equals_the_reference(seed: int) -> None:
    check_attention(attention_case(seed, DEVICE))


@pytest.mark.parametrize("seed", range(20))
def test_attention_of_a_refresh_equals_the_reference(seed: int) -> None:
    check_attention(refresh_case(seed, DEVICE))


@pytest.mark.parametrize("seed", range(12))
def test_fused_selection_chooses_what_selectors_choose(seed: int) -> None:
    check_fused_selection(seed, DEVICE, [300, 5_000, 40_000])


@pytest.mark.parametrize("seed", range(12))
def test_flush_equals_the_reference(seed: int) -> None:
    check_flush(seed, DEVICE)


@pytest.mark.parametrize("seed", range(12))
def test_selection_and_gather_equal_the_reference(seed: int) -> None:
    check_selection(seed, DEVICE, [300, 5_000, 40_000, 140_000])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_planned_steps_over_long_histories_equal_the_reference(dtype: torch.dtype) -> None:
    choose = random.Random(0)
    torch.manual_seed(0)
    for batch, queries, tokens in ((1, 1, 2308), (3, 1, 20_001), (2, 16, 5000), (1, 40, 9000)):
        table = ExtentTable(1, batch, 1, DEVICE)
        for sequence in range(batch):
            places = extents_of(choose, tokens, 1, 2, (128, 128), dtype, DEVICE, room=queries)
            table.place(0, sequence, places)
        table.upload()
        query = draw(batch, queries, 8, 128, dtype=dtype, device=DEVICE)
        new = draw(batch, queries, 2, 128, dtype=dtype, device=DEVICE)
        starts = torch.zeros(batch, 2, dtype=torch.int64, device=DEVICE)
        ends = torch.full((batch,), tokens, device=DEVICE)
        size = query.element_size()
        plan = plan_attention(2 * batch, 4 * queries, tokens, 128, size, device_limits(DEVICE))
        counters = torch.zeros(plan.counters(2 * batch, 4 * queries), dtype=torch.int32)
        call = ReferenceCall(scale=0.1)
        copied = copy_places(table.layer(0))
        expected, _ = reference_attend(query, new, new, copied, starts, ends, call)
        out, _ = attend(
            query,
            new,
            new,
            table.layer(0),
            starts,
            ends,
            counters.to(DEVICE),
            plan,
            AttentionOptions(0.1),
        )
        near = 2e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(out.float(), expected.float(), rtol=near, atol=near)


def test_a_captured_step_follows_lengths_and_addresses() -> None:
    """One graph serves a growing history, also after its buffers moved."""
    torch.manual_seed(0)
    choose, table = random.Random(1), ExtentTable(1, 2, 1, DEVICE)

    def place(tokens: int) -> None:
        for sequence in range(2):
            places = extents_of(choose, tokens, 1, 2, (64, 64), torch.float32, DEVICE, room=50)
            table.place(0, sequence, places)
        table.upload()

    place(700)
    query, new = (draw(2, 1, heads, 64, dtype=torch.float32, device=DEVICE) for heads in (4, 2))
    starts = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    ends = torch.tensor([700, 650], device=DEVICE)
    plan = plan_attention(4, 2, 4096, 64, 4, device_limits(DEVICE))
    counters = torch.zeros(4, dtype=torch.int32, device=DEVICE)

    def step() -> torch.Tensor:
        return attend(
            query, new, new, table.layer(0), starts, ends, counters, plan, AttentionOptions(0.2)
        )[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([700, 650], [701, 3], [20, 1500], [1999, 0]):
        if max(lengths) > 750:
            place(2000)
        ends.copy_(torch.tensor(lengths))
        query.normal_()
        new.normal_()
        places = copy_places(table.layer(0))
        expected, _ = reference_attend(
            query, new, new, places, starts, ends, ReferenceCall(scale=0.2)
        )
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_the_same_step_twice_gives_the_same_bits() -> None:
    """Programs finish in any order, but merge in one."""
    torch.manual_seed(0)
    table = ExtentTable(1, 1, 1, DEVICE)
    places = extents_of(random.Random(2), 9000, 1, 2, (128, 128), torch.bfloat16, DEVICE, room=1)
    table.place(0, 0, places)
    table.upload()
    query = draw(1, 1, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    new = draw(1, 1, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    starts = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    ends, counters = torch.tensor([9000], device=DEVICE), torch.zeros(2, dtype=torch.int32)
    counters = counters.to(DEVICE)
    plan = plan_attention(2, 4, 9000, 128, 2, device_limits(DEVICE))
    assert plan.splits > 8
    inputs = (query, new, new, table.layer(0), starts, ends, counters, plan)
    first = attend(*inputs, AttentionOptions(0.1))
    for _ in range(20):
        again = attend(*inputs, AttentionOptions(0.1))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# What torch's compiler warns of (its own deprecations, float32 precision) is not ours.
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_caller_keeps_the_operation() -> None:
    check_compiled(DEVICE, "inductor")
