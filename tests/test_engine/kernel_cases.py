"""Random cases for the step kernels, each checked against the plain reference.

They run in this process on a CUDA device, and in a child process under Triton's interpreter:
`python -m tests.test_engine.kernel_cases COUNT`, with TRITON_INTERPRET=1. Results are poisoned
before every launch, and so is everything that a kernel must not read.
"""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from sfi_agent.engine.kernels import scratch as scratch_module
from sfi_agent.engine.kernels import selection
from sfi_agent.engine.kernels.attention import attend, launch_attend
from sfi_agent.engine.kernels.flush import flush
from sfi_agent.engine.kernels.gather import gather
from sfi_agent.engine.kernels.masks import active_rows
from sfi_agent.engine.kernels.options import AttentionOptions, EvidenceBuffers
from sfi_agent.engine.kernels.plans import AttentionPlan, device_limits, plan_attention
from sfi_agent.engine.kernels.reference import (
    ReferenceCall,
    candidate_range,
    reference_attend,
    reference_flush,
    reference_gather,
    reference_select,
)
from sfi_agent.engine.kernels.scratch import SelectionScratch
from sfi_agent.engine.kernels.selection import rank
from sfi_agent.engine.kernels.tables import ExtentPlace, ExtentTable, LayerExtents
from tests.test_engine.fused_cases import check_fused_selection

NAN = float("nan")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def dtypes(device: torch.device) -> list[torch.dtype]:
    """What kernels compute in; the interpreter has no products in bfloat16."""
    return list(TOLERANCE) if device.type == "cuda" else [torch.float32, torch.float16]


def draw(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def extents_of(
    choose: random.Random,
    tokens: int,
    most: int,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    room: int,
) -> list[ExtentPlace]:
    """A history of `tokens`, cut at random, NaN where nothing was written yet."""
    cuts = (
        choose.sample(range(1, tokens), min(tokens - 1, choose.randrange(most))) if tokens else []
    )
    bounds = [0, *sorted(cuts), tokens]
    places = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        buffers = []
        for dim in dims:
            buffer = torch.full((heads + 1, last - first + room, dim), NAN, device=device)
            buffer = buffer.to(dtype)
            buffer[:, : last - first] = draw(
                heads + 1, last - first, dim, dtype=dtype, device=device
            )
            # Not the first head of the storage: strides and offsets must be followed.
            buffers.append(buffer[1:])
        places.append(ExtentPlace(buffers[0], buffers[1], first))
    return places


def copy_places(layer: LayerExtents) -> tuple[tuple[ExtentPlace, ...], ...]:
    return tuple(
        tuple(ExtentPlace(p.keys.clone(), p.values.clone(), p.first_position) for p in places)
        for places in layer.places
    )


def assert_same_buffers(
    got: tuple[tuple[ExtentPlace, ...], ...], expected: tuple[tuple[ExtentPlace, ...], ...]
) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own.keys, other.keys, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(own.values, other.values, rtol=0, atol=0, equal_nan=True)


@dataclass
class AttentionCase:
    """One step over a batch: inputs, where its tokens lie, and its options."""

    query: Tensor
    new_keys: Tensor
    new_values: Tensor
    layer: LayerExtents
    starts: Tensor
    ends: Tensor
    call: ReferenceCall
    plan: AttentionPlan
    with_values: bool
    evidence_dtype: torch.dtype
    evidence_capacity: int = 400


def attention_case(seed: int, device: torch.device) -> AttentionCase:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype = choose.choice(dtypes(device))
    group, heads = choose.choice([1, 2, 4, 5, 7, 8]), choose.choice([1, 2, 3])
    key_dim = choose.choice([64, 80, 96, 128, 256])
    value_dim = choose.choice([key_dim, key_dim, key_dim, 64, 128])
    batch, queries = choose.choice([1, 2, 3]), choose.choice([1, 1, 1, 2, 5, 17])
    own_tokens = choose.random() < 0.85
    asked = choose.choice([0, 0, 1, min(2, queries)])
    call = ReferenceCall(
        scale=key_dim**-0.5 * choose.choice([1, 3]),
        softcap=choose.choice([0.0, 0.0, 20.0]),
        window=choose.choice([0, 0, 7, 40]) if own_tokens and not asked else 0,
        sink_tokens=choose.choice([0, 4, 50]),
        recent_tokens=choose.choice([1, 8, 64]),
        evidence_queries=asked,
        append=own_tokens and choose.random() < 0.8,
        own_tokens=own_tokens,
    )
    extents = choose.choice([1, 1, 2, 3])
    table = ExtentTable(2, batch, extents, device)
    starts = torch.zeros(batch, heads, dtype=torch.int64)
    ends = [choose.choice([0, 1, 3, choose.randint(4, 300)]) for _ in range(batch)]
    for sequence, end in enumerate(ends):
        places = extents_of(
            choose, end, extents, heads, (key_dim, value_dim), dtype, device, queries + 5
        )
        table.place(1, sequence, places)
        if not asked:
            starts[sequence] = torch.tensor([choose.randint(0, end) for _ in range(heads)])
    table.upload()
    return AttentionCase(
        query=draw(batch, queries, heads * group, key_dim, dtype=dtype, device=device),
        new_keys=draw(batch, queries, heads, key_dim, dtype=dtype, device=device),
        new_values=draw(batch, queries, heads, value_dim, dtype=dtype, device=device),
        layer=table.layer(1),
        starts=starts.to(device),
        ends=torch.tensor(ends, device=device),
        call=call,
        plan=_any_plan(choose, key_dim),
        with_values=choose.random() < 0.85,
        evidence_dtype=choose.choice([torch.float32, torch.float32, torch.float16]),
    )


def _any_plan(choose: random.Random, key_dim: int) -> AttentionPlan:
    """Any tile sizes that fit a device, sensible or not."""
    largest = max(16, 4096 // (1 << (key_dim - 1).bit_length()))
    return AttentionPlan(
        block_rows=choose.choice([16, 32, 64]),
        block_tokens=min(largest, choose.choice([16, 32, 64])),
        splits=choose.choice([1, 2, 3, 5]),
        warps=choose.choice([2, 4, 8]),
        stages=choose.choice([2, 3, 4]),
    )


def refresh_case(seed: int, device: torch.device) -> AttentionCase:
    """What a refresh asks of attention: evidence in a batch of which some rows are not slow.

    Either an evidence-only pass over finished histories, or a step of slow and fast rows together,
    the fast ones over memories that begin behind slot 0 and may have more slots than evidence has
    places. Some rows are not used at all.
    """
    choose = random.Random(seed)
    case = attention_case(choose.randrange(1000), device)
    batch, own_tokens = case.query.shape[0], choose.random() < 0.5
    table, ends, starts = ExtentTable(1, batch, 3, device), case.ends.tolist(), case.starts * 0
    longest = 0
    for sequence, places in enumerate(case.layer.places):
        kind = choose.choice(["slow", "fast", "unused"])
        if kind == "unused":
            ends[sequence] = 0
        else:
            table.place(0, sequence, places)
        if kind == "fast":
            starts[sequence] = choose.randint(0, ends[sequence])
        else:
            longest = max(longest, ends[sequence])
    table.upload()
    queries = case.query.shape[1] if own_tokens else 1
    call = replace(
        case.call, window=0, evidence_queries=1, append=own_tokens, own_tokens=own_tokens
    )
    return replace(
        case,
        query=case.query[:, :queries].contiguous(),
        new_keys=case.new_keys[:, :queries].contiguous(),
        new_values=case.new_values[:, :queries].contiguous(),
        layer=table.layer(0),
        starts=starts,
        ends=torch.tensor(ends, device=device),
        call=call,
        with_values=own_tokens,
        evidence_capacity=longest + 17,
    )


def check_attention(case: AttentionCase) -> None:
    """One launch with poisoned outputs equals the reference, buffers and evidence included."""
    device = case.query.device
    call, kv_heads = case.call, case.new_keys.shape[2]
    batch, queries, query_heads, _ = case.query.shape
    out = torch.full((batch, queries, query_heads, case.new_values.shape[-1]), NAN, device=device)
    out = out.to(case.query.dtype)
    lse = torch.full((batch, query_heads, queries), NAN, device=device)
    rows = call.evidence_queries * query_heads // kv_heads
    logits = torch.full((batch, kv_heads, rows, case.evidence_capacity), NAN, device=device).to(
        case.evidence_dtype
    )
    rest_mass = torch.full((batch, kv_heads, rows), NAN, device=device)
    counters = torch.zeros(1024, dtype=torch.int32, device=device)
    places = copy_places(case.layer)
    expected_logits, expected_rest = logits.clone(), rest_mass.clone()
    expected, expected_lse = reference_attend(
        case.query, case.new_keys, case.new_values, places, case.starts, case.ends, call,
        expected_logits, expected_rest,
    )  # fmt: skip
    launch_attend(
        out, lse, case.query, case.new_keys, case.new_values, case.layer.fields, case.starts,
        case.ends, counters, logits if rows else None, rest_mass if rows else None, call.scale,
        call.softcap, call.window, call.append, call.own_tokens, case.with_values,
        call.sink_tokens, call.recent_tokens, call.evidence_queries, case.plan,
    )  # fmt: skip
    assert not counters.any(), "counters must be ready for the next launch"
    # The reference notes -inf where a head sees nothing yet, the kernel nothing.
    unseen = torch.arange(case.evidence_capacity, device=device) < case.starts[..., None, None]
    assert (logits.isnan() | ~unseen).all(), "evidence of what a head does not see"
    expected_logits.masked_fill_(unseen, NAN)
    tolerance = TOLERANCE[case.query.dtype]
    if case.with_values:
        torch.testing.assert_close(out.float(), expected.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-3)
    near = 1e-3 if case.evidence_dtype is torch.float32 else 8e-3
    torch.testing.assert_close(logits, expected_logits, rtol=near, atol=near, equal_nan=True)
    torch.testing.assert_close(rest_mass, expected_rest, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert_same_buffers(case.layer.places, places)


def random_logits(choose: random.Random, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Evidence of a kind: smooth, full of ties, clustered, constant, or half masked."""
    kind = choose.choice(["smooth", "ties", "clustered", "constant", "masked"])
    logits = 4.0 * torch.randn(shape, device=device)
    if kind == "ties":
        logits = logits.round()
    elif kind == "clustered":
        logits[..., 40:90] += 30.0
    elif kind == "constant":
        logits = torch.zeros_like(logits)
    elif kind == "masked":
        logits[torch.rand(shape, device=device) < 0.5] = float("-inf")
    return logits


def random_mask(choose: random.Random, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """What is active: a mask of either dtype."""
    mask = torch.rand(shape, device=device) < 0.6
    return mask if choose.random() < 0.5 else mask.long() * 7


def check_selection(seed: int, device: torch.device, capacities: list[int]) -> None:
    """Ranking is near float64, selection is exactly that of the ranked keys, gather of those.

    What is not active stays as it was, and kept candidates rank first.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    layers, batch, heads = (choose.choice([1, 2, 3]) for _ in range(3))
    rows, capacity = choose.choice([1, 2, 4, 5, 7, 14]), choose.choice(capacities)
    sink, recent = choose.choice([0, 4, 70]), choose.choice([1, 8, 64])
    budget = choose.choice([1, 5, 16, 100, capacity // 8 + 1])
    lengths = [choose.choice([capacity, choose.randint(1, capacity), 3]) for _ in range(batch)]
    tokens = torch.tensor(lengths, device=device)
    scratch = SelectionScratch((layers, batch, heads), capacity, device)
    for buffer in (scratch.keys, scratch.peaks, scratch.indices):
        buffer.random_(-(2**31), 2**31 - 1)
    width = scratch.keys.shape[-1]
    values = random_logits(choose, (layers, batch, heads, rows, width), device)
    lse = (20.0 + torch.randn(layers, batch, heads, rows, device=device)).round()
    logits = torch.full_like(values, NAN)
    for sequence, length in enumerate(lengths):
        place = (slice(None), sequence, ..., slice(*candidate_range(length, sink, recent)))
        logits[place] = values[place]
    active = random_mask(choose, (layers, batch), device) if choose.random() < 0.7 else None
    kept_first = torch.tensor([choose.randint(-5, length) for length in lengths], device=device)
    kept_stop = kept_first + choose.choice([0, 3, 50])
    kept = {"kept_first": kept_first, "kept_stop": kept_stop} if choose.random() < 0.5 else {}
    before = scratch.keys.clone()
    if choose.random() < 0.5:
        rank(logits, lse, tokens, scratch, sink, recent, active=active, **kept)
    else:
        for layer in range(layers):
            rank(
                logits[layer], lse[layer], tokens, scratch.layer(layer), sink, recent,
                active=None if active is None else active[layer], **kept,
            )  # fmt: skip
    keys = scratch.keys.clone()
    positions = torch.full((layers, batch, heads, budget), -99, device=device)
    counts = torch.full((layers, batch, heads), -99, device=device)
    selection.select(scratch, tokens, budget, sink, recent, active=active, out=(positions, counts))
    exact = (values - lse[..., None]).double().logsumexp(-2)
    for layer, sequence in itertools.product(range(layers), range(batch)):
        row = (layer, sequence)
        if active is not None and not active[row]:
            assert torch.equal(keys[row], before[row]), "ranked though not active"
            assert torch.equal(scratch.keys[row], before[row]), "selected though not active"
            assert (positions[row] == -99).all() and (counts[row] == -99).all()
            continue
        first, last = candidate_range(lengths[sequence], sink, recent)
        ranked = keys[row][:, first:last]
        scores = (ranked ^ ((ranked >> 31) & 0x7FFFFFFF)).view(torch.float32)
        wanted = exact[row]
        if kept:
            bounds = (max(0, int(end[sequence])) for end in (kept_first, kept_stop))
            wanted[:, slice(*bounds)] = float("inf")
        torch.testing.assert_close(scores.double(), wanted[:, first:last], rtol=1e-5, atol=1e-5)
        found, number = reference_select(keys[row], first, last, budget)
        assert torch.equal(positions[row], found)
        assert torch.equal(counts[row], number)
    _check_gather(choose, positions, counts, tokens, sink, recent, active)


def _check_gather(
    choose: random.Random,
    positions: Tensor,
    counts: Tensor,
    tokens: Tensor,
    sink: int,
    recent: int,
    active: Tensor | None,
) -> None:
    layers, batch, heads, budget = positions.shape
    device, dtype = positions.device, choose.choice(dtypes(positions.device))
    dims, extents = (
        (choose.choice([64, 80, 128]), choose.choice([64, 96])),
        choose.choice([1, 2, 3]),
    )
    history = ExtentTable(layers, batch, extents, device)
    memory = ExtentTable(layers, batch, 1, device)
    capacity = budget + choose.choice([0, 7])
    for layer in range(layers):
        for sequence, length in enumerate(tokens.tolist()):
            # Some row has to be there, to say what all are like.
            if active is not None and not active[layer, sequence] and (layer or sequence):
                continue
            places = extents_of(choose, length, extents, heads, dims, dtype, device, 2)
            history.place(layer, sequence, places)
            slots = capacity + sink + recent + 9
            key_buffer, value_buffer = (
                torch.full((heads, slots, dim), NAN, device=device).to(dtype) for dim in dims
            )
            memory.place(layer, sequence, [ExtentPlace(key_buffer, value_buffer)])
    history.upload()
    memory.upload()
    starts = torch.full_like(counts, -5)
    expected = [copy_places(memory.layer(layer)) for layer in range(layers)]
    expected_starts = starts.clone()
    gather(
        history, memory, positions, counts, tokens, starts, active,
        selected_capacity=capacity, sink_tokens=sink, recent_tokens=recent,
    )  # fmt: skip
    for layer, sequence in active_rows(active, layers, batch):
        reference_gather(
            history.layer(layer).places[sequence], expected[layer][sequence][0],
            positions[layer, sequence], counts[layer, sequence], int(tokens[sequence]), capacity,
            sink, recent,
        )  # fmt: skip
        expected_starts[layer, sequence] = capacity - counts[layer, sequence]
    assert torch.equal(starts, expected_starts)
    for layer in range(layers):
        assert_same_buffers(memory.layer(layer).places, expected[layer])


def check_flush(seed: int, device: torch.device) -> None:
    """Segments land behind their histories, and nothing else changes."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    layers, batch, heads = (choose.choice([1, 2, 3]) for _ in range(3))
    dtype, extents = choose.choice(dtypes(device)), choose.choice([1, 2, 3])
    dims = choose.choice([64, 80, 128]), choose.choice([64, 96])
    bounds = [
        (choose.randint(0, 20), choose.choice([0, 1, 5, 33, 70]), choose.choice([0, 1, 9, 130]))
        for _ in range(batch)
    ]
    memory = ExtentTable(layers, batch, 1, device)
    history = ExtentTable(layers, batch, extents, device)
    active = random_mask(choose, (layers, batch), device) if choose.random() < 0.7 else None
    for layer, sequence in itertools.product(range(layers), range(batch)):
        if active is not None and not active[layer, sequence] and (layer or sequence):
            continue
        first, count, length = bounds[sequence]
        places = extents_of(choose, length, extents, heads, dims, dtype, device, count + 2)
        history.place(layer, sequence, places)
        slots = extents_of(choose, first + count, 1, heads, dims, dtype, device, 3)
        memory.place(layer, sequence, slots)
    history.upload()
    memory.upload()
    expected = [copy_places(history.layer(layer)) for layer in range(layers)]
    starts, tokens, lengths = torch.tensor(bounds, device=device).T.contiguous()
    most = choose.choice([1, 33, 70])
    flush(memory, history, starts, tokens, lengths, active, most_tokens=most)
    for layer, sequence in active_rows(active, layers, batch):
        source = memory.layer(layer).places[sequence][0]
        reference_flush(source, expected[layer][sequence], *bounds[sequence])
    for layer in range(layers):
        assert_same_buffers(history.layer(layer).places, expected[layer])


def check_compiled(device: torch.device, backend: str) -> None:
    """A compiled caller keeps the operation whole, its written buffers included."""
    torch.manual_seed(0)
    table = ExtentTable(1, 2, 1, device)
    for sequence in range(2):
        places = extents_of(random.Random(0), 40, 1, 2, (64, 64), torch.float32, device, room=8)
        table.place(0, sequence, places)
    table.upload()
    query, new_keys, new_values = (
        draw(2, 1, heads, 64, dtype=torch.float32, device=device) for heads in (4, 2, 2)
    )
    starts = torch.zeros(2, 2, dtype=torch.int64, device=device)
    ends = torch.tensor([40, 33], device=device)
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    plan = plan_attention(4, 2, 64, 64, 4, device_limits(device))

    def step(evidence: EvidenceBuffers) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = attend(
            query * 1.0, new_keys, new_values, table.layer(0), starts, ends, counters, plan,
            AttentionOptions(0.1), evidence,
        )  # fmt: skip
        return out * 2, lse + 1, evidence.logits.sum()

    def buffers() -> EvidenceBuffers:
        shape = (2, 2, 2)
        zeros = torch.zeros(*shape, 64, device=device)
        return EvidenceBuffers(zeros, torch.zeros(shape, device=device), 4, 8)

    expected, got = step(buffers()), torch.compile(step, backend=backend, fullgraph=True)(buffers())
    for own, other in zip(got, expected, strict=True):
        torch.testing.assert_close(own, other)
    assert expected[2] != 0


def interpreter_problem() -> str | None:
    """Whether this Triton's interpreter works with this NumPy at all, on a kernel not ours."""
    triton, tl = import_module("triton"), import_module("triton.language")

    @triton.jit
    def trial(target, count):  # type: ignore[no-untyped-def]
        total = tl.load(count) * 0
        for step in range(tl.load(count), 5):
            total += step
        tl.store(target, total)

    target = torch.zeros(1, dtype=torch.int32)
    try:
        trial[(1,)](target, torch.full((1,), 3, dtype=torch.int32))
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter fails on a trivial loop: {error}"
    return None if target.item() == 7 else f"the interpreter computed {target.item()} for 7"


def main(count: int) -> None:
    problem = interpreter_problem()
    if problem is not None:
        print("unusable:", problem)
        return
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    # Small tiles, so that short inputs take every loop more than once.
    scratch_module._CAPACITY_STEP, scratch_module._MOST_PEAKS = 64, 64
    selection._RANK_TILE, selection._SHORTEN_TILE, selection._LIST = 64, 128, 64
    for seed in range(count):
        check_attention(attention_case(seed, cpu))
        if seed % 4 == 0:
            check_selection(seed, cpu, [100, 300])
            check_fused_selection(seed, cpu, [80, 200])
        if seed % 4 == 1:
            check_attention(refresh_case(seed, cpu))
            check_flush(seed, cpu)
    check_compiled(cpu, "aot_eager")
    print("checked", count)


if __name__ == "__main__":
    main(int(sys.argv[1]))
