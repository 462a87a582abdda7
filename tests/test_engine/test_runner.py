"""How a prefill is cut into chunks, and that chunks change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.runner import Runner, _chunks
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.switch import AttentionSwitch
from tests.families import tiny_engine
from tests.reference import dense_logits
from tests.test_guarantees.play import close


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 80))
def test_chunks_cover_everything_and_the_last_holds_the_evidence(
    total: int, size: int, evidence: int
) -> None:
    chunks = _chunks(total, size, evidence)
    assert chunks[0][0] == 0 and chunks[-1][1] == total
    assert all(end == start for (_, end), (start, _) in zip(chunks, chunks[1:], strict=False))
    lengths = [end - start for start, end in chunks]
    assert all(0 < length <= size for length in lengths[:-1])
    assert lengths[-1] >= min(evidence, total)
    assert lengths[-1] <= max(size, evidence)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_chunks_change_neither_logits_nor_history(family: str, size: int) -> None:
    engine = tiny_engine(family)
    ids = [token % 101 for token in range(0, 200, 7)]
    runner = Runner(engine.model, engine.shape, size)
    layout = MemoryLayout(1, 4, 4, engine.shape.device)
    sequence = SequenceState(engine.shape.windows, layout, frozenset())
    with AttentionSwitch.of(engine.model).switched_on(engine.model):
        output = runner.dense(sequence, ids, evidence_rows=5)
    assert output is not None
    assert close(output.logits, dense_logits(engine.model, ids)[-1])
    assert output.logits.dtype == torch.float32 and output.selected_mass is None
    assert sequence.processed_tokens == len(ids)
    for layer in sequence.layers:
        assert layer.history.tokens == len(ids)
        captured = layer.captured_query
        assert (captured is None) == (layer.memory is None)
        assert captured is None or captured.shape[1] == 5


@pytest.mark.parametrize("asked_before", [0, 1, 2])
def test_an_interrupted_prefill_keeps_whole_chunks(asked_before: int) -> None:
    engine = tiny_engine("llama")
    runner = Runner(engine.model, engine.shape, 4)
    sequence = SequenceState(engine.shape.windows, None, frozenset())
    answers = iter([False] * asked_before)
    with AttentionSwitch.of(engine.model).switched_on(engine.model):
        output = runner.dense(sequence, list(range(12)), interrupted=lambda: next(answers, True))
    assert output is None
    assert sequence.processed_tokens == 4 * asked_before
    assert {layer.history.tokens for layer in sequence.layers} == {4 * asked_before}


def test_a_forward_gets_positions_and_neither_cache_nor_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine("llama")
    given: list[dict[str, Any]] = []
    forward = engine.model.forward

    def noting(**keywords: Any) -> Any:
        given.append(keywords)
        return forward(**keywords)

    monkeypatch.setattr(engine.model, "forward", noting)
    with engine.session() as session:
        session.decode([1, 2, 3], max_new_tokens=2)
    assert [call["position_ids"].tolist() for call in given] == [[[0, 1, 2]], [[3]]]
    assert all(call["use_cache"] is False and "attention_mask" not in call for call in given)


def test_no_tokens_are_our_own_mistake() -> None:
    engine = tiny_engine("llama")
    sequence = SequenceState(engine.shape.windows, None, frozenset())
    with pytest.raises(AssertionError):
        Runner(engine.model, engine.shape).dense(sequence, [])
