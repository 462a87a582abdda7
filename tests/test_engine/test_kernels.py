"""Step kernels: their reference against float64 and the engine, plans, tables, dispatch.

The kernels themselves run in `test_the_kernels_equal_their_reference`, under Triton's interpreter,
and on a device in `test_kernels_gpu.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from subprocess import run

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfi_agent import Evidence
from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.kernels import (
    AttentionOptions,
    AttentionPlan,
    DeviceLimits,
    EvidenceBuffers,
    ExtentPlace,
    ExtentTable,
    SelectionScratch,
    attend,
    availability,
    device_limits,
    flush,
    gather,
    kernel_problem,
    merge_parts,
    plan_attention,
    rank,
    select,
    uses_kernels,
)
from sfi_agent.engine.kernels.masks import active_rows, mask_bytes
from sfi_agent.engine.kernels.reference import reference_select
from sfi_agent.engine.kernels.tables import FAR_POSITION
from sfi_agent.engine.memory import LayerMemory, MemoryLayout
from sfi_agent.plugins import build_selector
from tests.test_engine import kernel_cases
from tests.test_engine.fused_cases import check_fused_selection

CPU = torch.device("cpu")
HAS_TRITON = find_spec("triton") is not None
spread = settings(max_examples=30, derandomize=True, deadline=None, database=None)
NO_COUNTERS = torch.zeros(0, dtype=torch.int32)
ANY_PLAN = AttentionPlan(16, 16, 1, 4, 2)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_sequence(
    seed: int, tokens: int, room: int, extents: list[int], heads: int = 2, dim: int = 16
) -> ExtentTable:
    """A table with one layer and one sequence, cut at the positions in `extents`."""
    table = ExtentTable(1, 1, len(extents) + 1, CPU)
    bounds = [0, *extents, tokens]
    places = [
        ExtentPlace(
            draw(seed + first, heads, last - first + room, dim),
            draw(seed + first + 1, heads, last - first + room, dim),
            first,
        )
        for first, last in zip(bounds, bounds[1:], strict=False)
    ]
    table.place(0, 0, places)
    table.upload()
    return table


def joined(table: ExtentTable, tokens: int) -> tuple[Tensor, Tensor]:
    places = table.layer(0).places[0]
    stops = [place.first_position for place in places[1:]] + [tokens]
    lengths = [stop - place.first_position for stop, place in zip(stops, places, strict=True)]
    pairs = zip(places, lengths, strict=True)
    kept = [(place.keys[:, :length], place.values[:, :length]) for place, length in pairs]
    return torch.cat([keys for keys, _ in kept], 1), torch.cat([values for _, values in kept], 1)


# ---------------------------------------------------------------- attention reference


@spread
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(3, 40),
    queries=st.integers(1, 6),
    group=st.sampled_from([1, 2, 5]),
    softcap=st.sampled_from([0.0, 5.0]),
    window=st.sampled_from([0, 1, 4, 30]),
    cut=st.booleans(),
)
def test_attend_is_softmax_over_what_each_query_may_see(
    seed: int, tokens: int, queries: int, group: int, softcap: float, window: int, cut: bool
) -> None:
    table = one_sequence(seed, tokens, queries, [tokens // 2] if cut else [])
    keys, values = joined(table, tokens)
    query = draw(seed + 7, 1, queries, 2 * group, 16)
    new_keys, new_values = draw(seed + 8, 1, queries, 2, 16), draw(seed + 9, 1, queries, 2, 16)
    starts = torch.tensor([[0, tokens // 3]])
    out, lse = attend(
        query,
        new_keys,
        new_values,
        table.layer(0),
        starts,
        torch.tensor([tokens]),
        NO_COUNTERS,
        ANY_PLAN,
        AttentionOptions(0.3, softcap=softcap, window=window),
    )
    keys = torch.cat([keys, new_keys[0].transpose(0, 1)], 1).double()
    values = torch.cat([values, new_values[0].transpose(0, 1)], 1).double()
    for head in range(2 * group):
        for row in range(queries):
            first = int(starts[0, head // group])
            if window:
                first = max(first, tokens + row - window + 1)
            seen = slice(first, tokens + row + 1)
            logits = keys[head // group, seen] @ query[0, row, head].double() * 0.3
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            expected = logits.softmax(0) @ values[head // group, seen]
            torch.testing.assert_close(out[0, row, head].double(), expected, rtol=1e-4, atol=1e-5)
            found = lse[0, head, row].double()
            torch.testing.assert_close(found, logits.logsumexp(0), rtol=1e-4, atol=1e-5)


def test_attend_appends_behind_the_earlier_tokens() -> None:
    table = one_sequence(0, 10, 3, [4])
    before = [place.keys.clone() for place in table.layer(0).places[0]]
    new_keys, new_values = draw(1, 1, 3, 2, 16), draw(2, 1, 3, 2, 16)
    inputs = (draw(3, 1, 3, 2, 16), new_keys, new_values, table.layer(0))
    bounds = (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([10]), NO_COUNTERS, ANY_PLAN)
    attend(*inputs, *bounds, AttentionOptions(1.0, append=False))
    first, last = table.layer(0).places[0]
    assert torch.equal(first.keys, before[0]) and torch.equal(last.keys, before[1])
    attend(*inputs, *bounds, AttentionOptions(1.0))
    assert torch.equal(first.keys, before[0])
    assert torch.equal(last.keys[:, :6], before[1][:, :6])
    assert torch.equal(last.keys[:, 6:9], new_keys[0].transpose(0, 1))
    assert torch.equal(last.values[:, 6:9], new_values[0].transpose(0, 1))


def test_evidence_is_the_asked_rows_and_the_mass_elsewhere() -> None:
    tokens, queries, group = 30, 4, 2
    table = one_sequence(5, tokens, queries, [])
    keys, _ = joined(table, tokens)
    query, new = draw(6, 1, queries, 4, 16), draw(7, 1, queries, 2, 16)
    evidence = EvidenceBuffers(
        torch.full((1, 2, 2 * group, 40), float("nan")), torch.zeros(1, 2, 2 * group), 3, 2, 2
    )
    _, lse = attend(
        query,
        new,
        new,
        table.layer(0),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([tokens]),
        NO_COUNTERS,
        ANY_PLAN,
        AttentionOptions(0.3),
        evidence,
    )
    first, last = 3, tokens + queries - 2
    keys = torch.cat([keys, new[0].transpose(0, 1)], 1)
    for head in range(2):
        for row in range(2 * group):
            position = queries - 2 + row // group
            index = head * group + row % group
            logits = 0.3 * keys[head] @ query[0, position, index]
            logits[tokens + position + 1 :] = float("-inf")
            got = evidence.logits[0, head, row]
            torch.testing.assert_close(got[first:last], logits[first:last], rtol=1e-4, atol=1e-4)
            assert got[:first].isnan().all() and got[last:].isnan().all()
            mass = (logits - lse[0, index, position]).exp()
            rest = mass[:first].sum() + mass[last:].sum()
            torch.testing.assert_close(evidence.rest_mass[0, head, row], rest)


def test_a_shared_prefix_and_own_tokens_merge_into_one_softmax() -> None:
    """Two sequences read a prefix in one call of two queries, then each its own tokens."""
    tokens, shared = 20, 12
    table = one_sequence(0, tokens, 0, [])
    whole = table.layer(0).places[0][0]
    query, new = draw(1, 2, 1, 4, 16), draw(2, 2, 1, 2, 16)
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    both = ExtentTable(1, 2, 1, CPU)
    for sequence in range(2):
        place = ExtentPlace(whole.keys, whole.values)
        both.place(0, sequence, [place])
    ends = torch.tensor([tokens, tokens])
    inputs = (query, new, new, both.layer(0))
    expected, _ = attend(
        *inputs, zeros, ends, NO_COUNTERS, ANY_PLAN, AttentionOptions(0.2, append=False)
    )
    own = attend(
        *inputs, zeros + shared, ends, NO_COUNTERS, ANY_PLAN, AttentionOptions(0.2, append=False)
    )
    prefix_out, prefix_lse = attend(
        query.transpose(0, 1),
        new.transpose(0, 1),
        new.transpose(0, 1),
        table.layer(0),
        zeros[:1],
        torch.tensor([shared]),
        NO_COUNTERS,
        ANY_PLAN,
        AttentionOptions(0.2, append=False, own_tokens=False),
    )
    prefix = (prefix_out.transpose(0, 1), prefix_lse.permute(2, 1, 0))
    torch.testing.assert_close(merge_parts([prefix, own]), expected)
    nothing = (torch.zeros_like(expected), torch.full_like(own[1], float("-inf")))
    assert torch.equal(merge_parts([nothing, nothing]), torch.zeros_like(expected))


# ---------------------------------------------------------------- selection and gather


@pytest.mark.parametrize("seed", range(5))
def test_rank_and_select_choose_what_per_head_chooses(seed: int) -> None:
    """The selector's own torch code and the kernels' reference agree on a step's evidence."""
    tokens, sink, recent, budget, group = 60, 4, 9, 13, 2
    table = one_sequence(seed, tokens - 1, 1, [])
    evidence = EvidenceBuffers(torch.zeros(1, 2, group, 64), torch.zeros(1, 2, group), sink, recent)
    query, new = draw(seed + 1, 1, 1, 4, 16), draw(seed + 2, 1, 1, 2, 16)
    _, lse = attend(
        query,
        new,
        new,
        table.layer(0),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([tokens - 1]),
        NO_COUNTERS,
        ANY_PLAN,
        AttentionOptions(1.0),
        evidence,
    )
    length = torch.tensor([tokens])
    scratch = SelectionScratch((1, 2), 64, CPU)
    rank(evidence.logits, lse.reshape(1, 2, group), length, scratch, sink, recent)
    positions, counts = select(scratch, length, budget, sink, recent)
    expected = build_selector({"name": "per_head"}).select(
        Evidence(evidence.logits[..., sink : tokens - recent], None, evidence.rest_mass, sink),
        budget,
    )
    assert torch.equal(positions, expected.positions)
    assert torch.equal(counts, expected.counts)


@spread
@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    first=st.integers(0, 5),
    budget=st.integers(1, 40),
)
def test_selection_prefers_high_keys_then_low_positions(
    scores: list[int], first: int, budget: int
) -> None:
    keys = torch.tensor([[99] * first + scores + [99]], dtype=torch.int32)
    positions, counts = reference_select(keys, first, first + len(scores), budget)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:budget]
    expected = sorted(first + index for index in order)
    assert positions[0].tolist() == expected + [-1] * (budget - len(expected))
    assert counts.tolist() == [len(expected)]


def test_gather_fills_a_memory_as_a_refresh_does() -> None:
    """The engine's own refresh over a forked history is the judge."""
    heads, dim, sink, recent = 2, 16, 3, 5
    parent = LayerHistory()
    parent.append(draw(0, heads, 20, dim), draw(1, heads, 20, dim))
    history = parent.fork()
    history.append(draw(2, heads, 17, dim), draw(3, heads, 17, dim))
    layout = MemoryLayout(sink, 6, recent, CPU)
    plan = layout.plan(history.tokens)
    layout.begin_segment(plan, 4)
    positions = torch.tensor([[3, 9, 19, 20, 30, -1], [8, 25, -1, -1, -1, -1]])
    counts = torch.tensor([5, 2])
    expected = LayerMemory(layout)
    expected.refresh(history, plan, positions, counts)
    sources, memory = ExtentTable(1, 1, 2, CPU), ExtentTable(1, 1, 1, CPU)
    buffers = [extent.buffer for extent in history.extents]
    first, second = (
        ExtentPlace(b.keys, b.values, s) for b, s in zip(buffers, (0, 20), strict=True)
    )
    sources.place(0, 0, [first, second])
    place = ExtentPlace(torch.zeros_like(expected.keys), torch.zeros_like(expected.values))
    memory.place(0, 0, [place])
    starts = torch.zeros(1, 1, heads, dtype=torch.int64)
    gather(
        sources, memory, positions[None, None], counts[None, None], torch.tensor([37]), starts,
        selected_capacity=layout.selected_capacity, sink_tokens=sink, recent_tokens=recent,
    )  # fmt: skip
    assert torch.equal(starts[0, 0], expected.starts)
    for head, start in enumerate(expected.starts.tolist()):
        visible = slice(start, layout.segment_start)
        assert torch.equal(place.keys[head, visible], expected.keys[head, visible])
        assert torch.equal(place.values[head, visible], expected.values[head, visible])


@pytest.mark.parametrize("seed", range(30))
def test_fused_selection_chooses_what_selectors_choose(seed: int) -> None:
    """`per_head`, `top_k` and `question` themselves are the judges, ties included."""
    check_fused_selection(seed, CPU, [40, 200])


@pytest.mark.parametrize("seed", range(10))
def test_what_is_not_active_is_left_alone(seed: int) -> None:
    kernel_cases.check_selection(seed, CPU, [100, 300])
    kernel_cases.check_flush(seed, CPU)


def test_a_mask_is_of_layers_and_sequences() -> None:
    scratch = SelectionScratch((2, 3, 4), 64, CPU)
    for mask in (torch.ones(3, 2).bool(), torch.ones(2, 3).float(), torch.ones(3, 2).bool().T):
        with pytest.raises(AssertionError, match="mask"):
            mask_bytes(mask, scratch.shape[:-1], scratch.keys)
    wanted = torch.tensor([[True, False, False], [False, True, True]])
    assert mask_bytes(wanted, (2, 3), scratch.keys).dtype is torch.uint8
    assert mask_bytes(None, (2, 3), scratch.keys) is scratch.keys
    assert list(active_rows(wanted, 2, 3)) == [(0, 0), (1, 1), (1, 2)]
    assert len(list(active_rows(None, 2, 3))) == 6


def test_flush_appends_a_segment_as_the_engine_does() -> None:
    """Fast tokens of a memory, appended to a history by the engine, are the judge."""
    heads, dim = 2, 16
    history, layout = LayerHistory(reserve_tokens=40), MemoryLayout(3, 6, 5, CPU)
    history.append(draw(0, heads, 20, dim), draw(1, heads, 20, dim))
    plan = layout.plan(20)
    layout.begin_segment(plan, 8)
    memory = LayerMemory(layout)
    none = torch.zeros(heads, dtype=torch.int64)
    memory.refresh(history, plan, none[:, None][:, :0], none)
    for step in range(4):
        memory.append(draw(2 + step, heads, 1, dim), draw(9 + step, heads, 1, dim))
        layout.advance(1)
    buffer = history.extents[-1].buffer
    copies = buffer.keys.clone(), buffer.values.clone()
    sources, targets = ExtentTable(1, 1, 1, CPU), ExtentTable(1, 1, 1, CPU)
    sources.place(0, 0, [ExtentPlace(memory.keys, memory.values)])
    targets.place(0, 0, [ExtentPlace(*copies)])
    numbers = (torch.tensor([layout.segment_start]), torch.tensor([4]), torch.tensor([20]))
    flush(sources, targets, *numbers, most_tokens=8)
    history.append(*memory.segment(4))
    for got, expected in zip(copies, (buffer.keys, buffer.values), strict=True):
        assert torch.equal(got[:, :24], expected[:, :24])


def test_scratch_says_what_it_takes_and_grows_by_a_quarter() -> None:
    scratch = SelectionScratch((2, 3), 4000, CPU)
    tensors = (scratch.keys, scratch.indices, scratch.peaks)
    assert scratch.bytes == sum(tensor.nbytes for tensor in tensors)
    assert scratch.bytes == SelectionScratch.bytes_for((2, 3), 4000) == 6 * 4096 * 12
    assert not scratch.grow(4096) and scratch.keys is tensors[0]
    assert scratch.grow(4097) and scratch.capacity == 5120 and scratch.shape == (2, 3)
    assert scratch.grow(131_072) and scratch.peak_tokens == 8
    assert scratch.bytes == 6 * 1_114_112 == SelectionScratch.bytes_for((2, 3), 131_072)


# ---------------------------------------------------------------- tables and plans


def test_a_row_that_is_not_used_sees_its_own_tokens_and_keeps_none() -> None:
    table = one_sequence(0, 10, 2, [])
    place = table.layer(0).places[0][0]
    both = ExtentTable(1, 2, 1, CPU)
    both.place(0, 0, [place])
    both.place(0, 1, [place])
    both.clear(0, 1)
    both.upload()
    assert (both.fields[0, 1, :, -1] == FAR_POSITION).all() and both.any_place is place
    assert both.layer(0).kv_heads == 2
    query, new = draw(1, 2, 1, 4, 16), draw(2, 2, 1, 2, 16)
    before = place.keys.clone()
    for length in (0, 7):
        out, _ = attend(
            query,
            new,
            new,
            both.layer(0),
            torch.zeros(2, 2, dtype=torch.int64),
            torch.tensor([10, length]),
            NO_COUNTERS,
            ANY_PLAN,
            AttentionOptions(0.2),
        )
        torch.testing.assert_close(out[1, 0], new[1, 0].repeat_interleave(2, dim=0))
    assert torch.equal(place.keys[:, :10], before[:, :10])


def test_a_table_holds_addresses_and_a_sentinel() -> None:
    table = one_sequence(0, 10, 2, [6])
    first, last = table.layer(0).places[0]
    fields = table.fields[0, 0].tolist()
    assert fields[0] == [first.keys.data_ptr(), first.values.data_ptr(), 8 * 16, 8 * 16, 0]
    assert fields[1] == [last.keys.data_ptr(), last.values.data_ptr(), 6 * 16, 6 * 16, 6]
    assert fields[2][-1] == FAR_POSITION
    table.place(0, 0, [first])
    assert table.fields[0, 0].tolist() == fields, "nothing changes before upload"
    table.upload()
    assert table.fields[0, 0, 1, -1] == FAR_POSITION


@pytest.mark.parametrize(
    "place",
    [
        ExtentPlace(torch.zeros(2, 16, 8).transpose(1, 2), torch.zeros(2, 8, 16)),
        ExtentPlace(torch.zeros(2, 8, 32)[..., :16], torch.zeros(2, 8, 16)),
        ExtentPlace(torch.zeros(2, 8, 16), torch.zeros(400)[1:257].view(2, 8, 16)),
    ],
    ids=["transposed", "gaps", "unaligned"],
)
def test_a_table_refuses_what_kernels_cannot_read(place: ExtentPlace) -> None:
    with pytest.raises(AssertionError):
        ExtentTable(1, 1, 1, CPU).place(0, 0, [place])


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    pairs=st.integers(1, 600),
    rows=st.integers(1, 800),
    tokens=st.integers(1, 1 << 20),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    element_bytes=st.sampled_from([2, 4]),
    shared=st.sampled_from([99_000, 166_000, 232_448]),
)
def test_plans_fit_the_device(
    pairs: int, rows: int, tokens: int, dim: int, element_bytes: int, shared: int
) -> None:
    limits = DeviceLimits(132, shared)
    plan = plan_attention(pairs, rows, tokens, dim, element_bytes, limits)
    assert AttentionPlan.from_list(plan.as_list()) == plan
    tile_bytes = plan.block_tokens * max(16, 1 << (dim - 1).bit_length()) * element_bytes
    assert 2 * tile_bytes * plan.stages <= shared
    for size in (plan.block_rows, plan.block_tokens):
        assert size >= 16 and size & (size - 1) == 0
    assert 1 <= plan.splits <= max(1, tokens // plan.block_tokens)
    if plan.block_rows > 16:
        assert 8 * plan.block_rows * dim <= shared and element_bytes == 2
    programs = plan.counters(pairs, rows) * plan.splits
    assert programs >= pairs * rows / plan.block_rows
    if plan.splits < min(128, tokens // (4 * plan.block_tokens)):
        assert programs >= 66, "half of the device is idle though there is work to split"


# ---------------------------------------------------------------- dispatch


def test_a_cpu_runs_the_reference_and_says_why() -> None:
    problem = kernel_problem(CPU, torch.float32, 64, 64)
    assert problem == ("no kernels for cpu" if HAS_TRITON else "Triton is not installed")
    availability._choose.cache_clear()
    with capture_logs() as logs:
        assert not uses_kernels(CPU, torch.float32, 64, 64)
        assert not uses_kernels(CPU, torch.float32, 64, 64)
    chosen = [entry for entry in logs if entry["event"] == "step_kernels_chosen"]
    assert [entry["reason"] for entry in chosen] == [problem]
    assert chosen[0]["kernels"] == "reference"


def test_unsupported_heads_and_dtypes_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_installed", lambda: True)
    monkeypatch.setattr(availability, "_interpreted", lambda: True)
    assert kernel_problem(CPU, torch.float32, 80, 128) is None
    assert "float64" in (kernel_problem(CPU, torch.float64, 64, 64) or "")
    assert "bfloat16" in (kernel_problem(CPU, torch.bfloat16, 64, 64) or "")
    for dims in ((512, 64), (64, 60)):
        assert "head size" in (kernel_problem(CPU, torch.float32, *dims) or "")
    monkeypatch.setattr(availability, "_interpreted", lambda: False)
    assert kernel_problem(CPU, torch.float32, 64, 64) == "no kernels for cpu"
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "(7, 5)" in (kernel_problem(gpu, torch.float32, 64, 64) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(availability, "device_limits", lambda device: DeviceLimits(128, 101_376))
    assert kernel_problem(gpu, torch.bfloat16, 256, 256) is None
    assert "101376 bytes" in (kernel_problem(gpu, torch.float32, 256, 256) or "")


def test_operations_have_shapes_without_data() -> None:
    """What a compiler needs to know: fake tensors go in, shapes and dtypes come out."""
    with FakeTensorMode():
        query = torch.empty(3, 2, 8, 64, dtype=torch.bfloat16)
        new_keys, new_values = query.new_empty(3, 2, 4, 64), query.new_empty(3, 2, 4, 96)
        numbers = torch.empty(3, 4, dtype=torch.int64)
        fields, counters = numbers.new_empty(3, 2, 5), torch.empty(99, dtype=torch.int32)
        out, lse = torch.ops.sfi_agent.attend(
            query, new_keys, new_values, fields, numbers, numbers[:, 0], counters, None, None,
            1.0, 0.0, 0, True, True, True, 0, 0, 0, ANY_PLAN.as_list(),
        )  # fmt: skip
        assert out.shape == (3, 2, 8, 96) and out.dtype is torch.bfloat16
        assert lse.shape == (3, 8, 2) and lse.dtype is torch.float32
        keys = counters.new_empty(5, 3, 4, 256)
        positions, counts = torch.ops.sfi_agent.select(keys, keys, keys, numbers[:, 0], 17, 0, 0, 1)
        assert positions.shape == (5, 3, 4, 17) and positions.dtype is torch.int64
        assert counts.shape == (5, 3, 4) and counts.dtype is torch.int64
        operations = torch.ops.sfi_agent
        operations.select_into(
            positions, counts, keys, keys.clone(), keys.clone(), numbers[:, 0], 17, 0, 0, 1
        )
        tables = numbers.new_empty(5, 3, 2, 5)
        columns = (numbers[:, 0],) * 3
        operations.flush(query, tables, tables.clone(), *columns, None, 9, 4, 64, 64)


def test_limits_of_a_cpu_are_those_of_a_small_device() -> None:
    assert device_limits(CPU) == DeviceLimits(4, 100_000)


def test_importing_the_kernels_imports_no_triton(child_python: Callable[..., str]) -> None:
    program = """
        import sys, sfi_agent.engine.kernels
        print([name for name in sys.modules if name.split(".")[0] == "triton"])
    """
    before = child_python('import sys, torch; print("triton" in sys.modules)')
    assert before == "True" or child_python(program) == "[]"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_equal_their_reference(
    child_environment: Callable[..., dict[str, str]],
) -> None:
    """Under Triton's interpreter, in a child: the choice is made when Triton is imported."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    root = Path(__file__).resolve().parent.parent.parent
    environment = child_environment(root, Path(spec.origin).parent.parent)
    # NumPy warns of the log of 0 that stands for "nothing seen".
    environment |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.test_engine.kernel_cases", "16"]
    done = run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.startswith("unusable:"):
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip() == "checked 16"
