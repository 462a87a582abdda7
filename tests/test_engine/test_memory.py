"""Memory buffers: layout, refresh, ragged counts, growth, attention over what is visible."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent.engine import memory as memory_module
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.memory import LayerMemory, MemoryLayout
from sfi_agent.engine.sdpa import reference_attention

CPU = torch.device("cpu")
HEADS, DIM = 3, 8


def filled_history(cuts: list[int], tokens: int) -> LayerHistory:
    """A history in several extents (forked at each cut) whose values tell positions and heads."""
    generator = torch.Generator().manual_seed(tokens)
    history = LayerHistory()
    for start, end in zip([0, *cuts], [*cuts, tokens], strict=True):
        if start:
            history = history.fork()
        if start < end:
            keys = torch.randn(HEADS, end - start, DIM, generator=generator)
            values = torch.arange(start, end, dtype=torch.float32)[None, :, None]
            offset = 1000.0 * torch.arange(HEADS)[:, None, None]
            history.append(keys, (values + offset).expand(-1, -1, DIM))
    return history


def random_selection(
    start: int, end: int, budget: int, ragged: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Positions `[heads, budget]` and counts `[heads]` as a selector would return them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.full((HEADS,), budget)
    if ragged:
        counts = torch.randint(0, budget + 1, (HEADS,), generator=generator)
    positions = torch.full((HEADS, budget), -1)
    for head in range(HEADS):
        chosen = torch.randperm(end - start, generator=generator)[: counts[head]] + start
        positions[head, : counts[head]] = chosen.sort().values
    return positions, counts


def visible_positions(memory: LayerMemory) -> list[list[int]]:
    """Per head the positions in its visible slots, in slot order."""
    found = []
    for head, first in enumerate(memory.starts.tolist()):
        values = memory.values[head, first : memory.layout.end, 0] - 1000.0 * head
        found.append([int(value) for value in values])
    return found


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(
    sink=st.integers(0, 5),
    budget=st.integers(0, 40),
    recent=st.integers(1, 30),
    tokens=st.integers(1, 60),
    cuts=st.lists(st.integers(1, 59), max_size=3, unique=True),
    ragged=st.booleans(),
    segment=st.integers(1, 5),
)
def test_a_refresh_holds_sink_selected_recent_and_then_the_segment(
    sink: int,
    budget: int,
    recent: int,
    tokens: int,
    cuts: list[int],
    ragged: bool,
    segment: int,
) -> None:
    history = filled_history(sorted(cut for cut in cuts if cut < tokens), tokens)
    layout = MemoryLayout(sink, budget, recent, CPU)
    memory = LayerMemory(layout)
    plan = layout.plan(tokens)
    assert plan.sink_tokens + plan.candidates + plan.recent_tokens == tokens
    layout.begin_segment(plan, segment)
    places = min(budget, plan.candidates)
    positions, counts = random_selection(
        plan.sink_tokens, plan.recent_start, places, ragged, tokens
    )
    memory.refresh(history, plan, positions, counts)
    rest = [*range(plan.sink_tokens), *range(plan.recent_start, tokens)]
    expected = [[*positions[h, : counts[h]].tolist(), *rest] for h in range(HEADS)]
    assert visible_positions(memory) == expected
    for new in range(segment):
        assert int(layout.write_index) == layout.end
        added = torch.full((HEADS, 1, DIM), float(tokens + new))
        memory.append(added, added + 1000.0 * torch.arange(HEADS)[:, None, None])
        layout.advance(1)
        for head in expected:
            head.append(tokens + new)
        assert visible_positions(memory) == expected
    keys, values = memory.segment(segment)
    assert (
        keys[0, :, 0].tolist() == values[0, :, 0].tolist() == [tokens + n for n in range(segment)]
    )
    assert layout.capacity == memory.keys.shape[1] >= layout.end


@pytest.mark.parametrize("common", [True, False], ids=["sliced", "masked"])
@pytest.mark.parametrize("queries_per_head", [1, 4])
def test_attention_over_the_memory(common: bool, queries_per_head: int) -> None:
    """Both paths against the plain form over exactly the visible keys of each head."""
    history, layout = filled_history([], 50), MemoryLayout(2, 10, 5, CPU)
    memory = LayerMemory(layout)
    plan = layout.plan(50)
    layout.begin_segment(plan, 3)
    positions, counts = random_selection(2, 45, 10, ragged=not common, seed=3)
    memory.refresh(history, plan, positions, counts)
    memory.common_start = int(memory.starts[0]) if common else None
    # Slots that are not visible must not matter, whatever an earlier segment left in them.
    stale = torch.arange(layout.capacity)[None] < memory.starts[:, None]
    memory.keys[stale] = 77.0
    memory.values[stale] = 1e6
    memory.keys[:, layout.end + 1 :] = 77.0
    query = torch.randn(
        HEADS * queries_per_head, 1, DIM, generator=torch.Generator().manual_seed(1)
    )
    added = torch.randn(HEADS, 1, DIM, generator=torch.Generator().manual_seed(2))
    memory.append(added, added)
    rule = AttentionRule(0.7)
    out, mass = memory.attend(query, rule), memory.selected_mass(query, rule)
    masses = []
    for row in range(query.shape[0]):
        head = row // queries_per_head
        slots = slice(int(memory.starts[head]), layout.end + 1)
        keys, values = memory.keys[head, slots], memory.values[head, slots]
        expected, _ = reference_attention(
            query[row : row + 1], keys[None], values[None], 0.7, False
        )
        torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-4, atol=1e-3)
        weights = (keys @ query[row, 0] * 0.7).softmax(-1)
        masses.append(float(weights[: int(counts[head])].sum()))
    assert float(mass) == pytest.approx(sum(masses) / len(masses), abs=1e-5)


def test_buffers_grow_towards_the_budget_and_then_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_ALLOCATION_STEP_TOKENS", 8)
    layout = MemoryLayout(2, 100, 10, CPU)
    memory, sizes, addresses = LayerMemory(layout), [], []
    for tokens in (5, 20, 30, 60, 150, 151, 190, 40):
        history = filled_history([], tokens)
        plan = layout.plan(tokens)
        layout.begin_segment(plan, 6)
        places = min(100, plan.candidates)
        memory.refresh(history, plan, *random_selection(2, plan.recent_start, places, False, 1))
        assert len(visible_positions(memory)[0]) == places + plan.sink_tokens + plan.recent_tokens
        sizes.append(layout.selected_capacity)
        addresses.append(memory.keys.data_ptr())
    assert sizes == [0, 8, 24, 48, 100, 100, 100, 100]
    assert len(set(addresses[4:])) == 1, "a full buffer moved"


def test_new_buffers_are_zero() -> None:
    layout = MemoryLayout(1, 5, 2, CPU)
    memory, history = LayerMemory(layout), filled_history([], 20)
    plan = layout.plan(20)
    layout.begin_segment(plan, 4)
    memory.refresh(history, plan, *random_selection(1, 18, 5, True, 4))
    assert bool((memory.keys[:, layout.end :] == 0).all())
    assert memory.bytes == memory.keys.nbytes + memory.values.nbytes


@pytest.mark.parametrize(
    ("tokens", "sink", "start"),
    [(1, 1, 1), (3, 3, 3), (4, 4, 4), (9, 4, 4), (12, 4, 4), (13, 4, 5)],
)
def test_short_histories_have_no_candidates(tokens: int, sink: int, start: int) -> None:
    plan = MemoryLayout(4, 100, 8, CPU).plan(tokens)
    assert (plan.sink_tokens, plan.recent_start) == (sink, start)
    assert plan.candidates == start - sink
