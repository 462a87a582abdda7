"""Evidence from a history in pieces, and what a refresh does with a selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfi_agent import Evidence, PluginError, Selection, SessionConfig, build_selector
from sfi_agent.engine import refresh as refresh_module
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.memory import LayerMemory, MemoryLayout
from sfi_agent.engine.refresh import layer_evidence, refresh_memory
from sfi_agent.engine.sequence import LayerState, SequenceState
from tests.families import tiny_engine
from tests.test_engine.test_memory import DIM, HEADS, filled_history, visible_positions

CPU = torch.device("cpu")
TOKENS, GROUP = 60, 2


def captured(queries: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(queries)
    return torch.randn(HEADS * GROUP, queries, DIM, generator=generator)


@pytest.mark.parametrize("cuts", [[], [17], [5, 33]])
@pytest.mark.parametrize("queries", [1, 3, 30])
@pytest.mark.parametrize("chunk", [4, 64])
def test_evidence_by_the_book(
    cuts: list[int], queries: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row: query-major rows, causal limits, masses of what is no candidate."""
    monkeypatch.setitem(refresh_module._EVIDENCE_CHUNK_TOKENS, "cpu", chunk)
    history, query = filled_history(cuts, TOKENS), captured(queries)
    layout = MemoryLayout(3, 10, 8, CPU)
    layer = LayerState(history, None, LayerMemory(layout), query, AttentionRule(0.3))
    plan = layout.plan(TOKENS)
    evidence = layer_evidence(layer, plan, with_norms=True)
    keys = history.joined(0, TOKENS).keys
    assert evidence.candidate_start == 3
    assert evidence.logits.shape == (1, HEADS, queries * GROUP, 49)
    for head in range(HEADS):
        for row in range(queries * GROUP):
            newest = TOKENS - queries + row // GROUP
            logits = 0.3 * keys[head] @ query[head * GROUP + row % GROUP, row // GROUP]
            logits[newest + 1 :] = float("-inf")
            torch.testing.assert_close(
                evidence.logits[0, head, row], logits[3:52], rtol=1e-4, atol=1e-4
            )
            rest = 1.0 - logits.softmax(-1)[3:52].sum()
            torch.testing.assert_close(evidence.rest_mass[0, head, row], rest, rtol=1e-4, atol=1e-5)
    assert evidence.key_norms is not None
    torch.testing.assert_close(evidence.key_norms[0], keys[:, 3:52].norm(dim=-1))
    assert layer_evidence(layer, plan, with_norms=False).key_norms is None


class _Fixed:
    """Selects the same places in every layer and notes what it was asked."""

    def __init__(self, needs: frozenset[str], positions: list[int]) -> None:
        self.needs = needs
        self.positions = positions
        self.asked: list[tuple[int, bool]] = []

    def select(self, evidence: Evidence, budget: int) -> Selection:
        self.asked.append((budget, evidence.key_norms is not None))
        positions = torch.tensor(self.positions).expand(1, HEADS, -1)
        return Selection(positions, torch.full((1, HEADS), len(self.positions)))


def ready_sequence(layout: MemoryLayout, tokens: int = TOKENS) -> SequenceState:
    """Four layers, number 1 dense, number 2 sliding; all captured one query."""
    sequence = SequenceState((None, None, 5, None), layout, frozenset({1}))
    for layer in sequence.layers:
        layer.history = filled_history([], tokens)
        layer.captured_query = captured(1)
    sequence.processed_tokens = tokens
    return sequence


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"key_norms"})])
def test_sparse_layers_are_filled_and_others_left_out(needs: frozenset[str]) -> None:
    layout = MemoryLayout(2, 4, 5, CPU)
    sequence, selector = ready_sequence(layout), _Fixed(needs, [7, 20, 21])
    selections = refresh_memory(sequence, selector, segment_capacity=4)
    assert [selection is None for selection in selections] == [False, True, True, False]
    assert selector.asked == [(4, bool(needs))] * 2
    for layer in (sequence.layers[0], sequence.layers[3]):
        assert layer.memory is not None and layer.captured_query is None
        assert visible_positions(layer.memory) == [[7, 20, 21, 0, 1, *range(55, 60)]] * HEADS
        assert layer.memory.common_start == 1
    assert layout.ready
    assert layout.visible_tokens == 10


@pytest.mark.parametrize(("budget", "tokens"), [(0, TOKENS), (4, 7), (4, 1)])
def test_nothing_to_select_asks_nobody(budget: int, tokens: int) -> None:
    layout = MemoryLayout(2, budget, 5, CPU)
    sequence, selector = ready_sequence(layout, tokens), _Fixed(frozenset(), [])
    assert refresh_memory(sequence, selector, segment_capacity=4) == [None] * 4
    assert selector.asked == []
    assert layout.ready and layout.visible_tokens == min(7, tokens)


def test_a_refused_selection_leaves_the_memory_unready() -> None:
    layout = MemoryLayout(2, 4, 5, CPU)
    sequence = ready_sequence(layout)
    with pytest.raises(PluginError, match=r"_Fixed.*ascending positions in \[2, 55\)"):
        refresh_memory(sequence, _Fixed(frozenset(), [9, 55]), segment_capacity=4)
    assert not layout.ready


def test_a_selection_of_sparse_tensors_is_refused() -> None:
    class Sparse(_Fixed):
        def select(self, evidence: Evidence, budget: int) -> Selection:
            selection = super().select(evidence, budget)
            return Selection(selection.positions.to_sparse(), selection.counts)

    sequence = ready_sequence(MemoryLayout(2, 4, 5, CPU))
    with pytest.raises(PluginError, match=r"Sparse .*torch\.sparse_coo"):
        refresh_memory(sequence, Sparse(frozenset(), [9, 12]), segment_capacity=4)


def test_evidence_says_where_the_prompt_ends() -> None:
    ends: list[int | None] = []

    class Noting:
        needs: frozenset[str] = frozenset()

        def select(self, evidence: Evidence, budget: int) -> Selection:
            ends.append(evidence.prompt_end)
            return build_selector({"name": "per_head"}).select(evidence, budget)

    config = SessionConfig(
        boundaries=[{"name": "interval", "every_tokens": 2}],
        memory={"sink_tokens": 1, "selected_tokens": 4, "recent_tokens": 3},
        refresh={"min_segment_tokens": 1},
    )
    with tiny_engine("llama").session(config) as session:
        core: Any = session._core
        core._decoder.steps.selector = Noting()
        session.decode(list(range(10, 30)), max_new_tokens=6)
        first = len(ends)
        session.decode([5, 6], max_new_tokens=6)
    assert set(ends[:first]) == {20} and set(ends[first:]) == {28}
