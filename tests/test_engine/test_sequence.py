"""A sequence between steps: where keys lie, flushing, discarding, settling."""

from __future__ import annotations

import torch

from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.sequence import SequenceState
from tests.test_engine.test_memory import DIM, HEADS
from tests.test_engine.test_refresh import TOKENS, _Fixed, ready_sequence


def fast_token(sequence: SequenceState, number: float, *, layers: int = 4) -> None:
    """Write a token as a fast step does, into the first `layers` layers."""
    added = torch.full((HEADS, 1, DIM), number)
    for layer in sequence.layers[:layers]:
        if layer.memory is not None:
            layer.memory.append(added, added)
        else:
            layer.history.append(added, added)


def finish(sequence: SequenceState) -> None:
    assert sequence.layout is not None
    sequence.layout.advance(1)
    sequence.processed_tokens += 1


def refreshed() -> SequenceState:
    sequence = ready_sequence(MemoryLayout(2, 4, 5, torch.device("cpu")))
    refresh_memory(sequence, _Fixed(frozenset(), [7]), segment_capacity=4)
    return sequence


def lengths(sequence: SequenceState) -> list[int]:
    return [layer.history.tokens for layer in sequence.layers]


def test_fast_tokens_reach_the_history_of_sparse_layers_when_flushed() -> None:
    sequence = refreshed()
    for number in (501.0, 502.0):
        fast_token(sequence, number)
        finish(sequence)
    assert lengths(sequence) == [60, 62, 62, 60]
    assert sequence.segment_tokens == 2
    sequence.flush_segment()
    assert lengths(sequence) == [62] * 4
    assert sequence.segment_tokens == 0
    assert sequence.layout is not None and not sequence.layout.ready
    for layer in sequence.layers:
        assert layer.history.joined(60, 62).keys[0, :, 0].tolist() == [501.0, 502.0]
    sequence.flush_segment()
    assert lengths(sequence) == [62] * 4


def test_a_discarded_fast_token_leaves_nothing() -> None:
    sequence = refreshed()
    for number in (501.0, 502.0):
        fast_token(sequence, number)
        finish(sequence)
    sequence.discard_fast_token()
    assert (sequence.processed_tokens, sequence.segment_tokens) == (61, 1)
    assert lengths(sequence) == [60, 61, 61, 60]
    fast_token(sequence, 503.0)
    finish(sequence)
    sequence.flush_segment()
    for layer in sequence.layers:
        assert layer.history.joined(60, 62).keys[0, :, 0].tolist() == [501.0, 503.0]


def test_settling_drops_what_an_interrupted_step_wrote() -> None:
    for reached in range(5):
        sequence = refreshed()
        fast_token(sequence, 501.0)
        finish(sequence)
        fast_token(sequence, 666.0, layers=reached)
        sequence.settle()
        assert lengths(sequence) == [60, 61, 61, 60]
        fast_token(sequence, 502.0)
        finish(sequence)
        sequence.flush_segment()
        for layer in sequence.layers:
            assert layer.history.joined(60, 62).keys[0, :, 0].tolist() == [501.0, 502.0]


def test_settling_drops_what_an_interrupted_dense_step_wrote() -> None:
    sequence = ready_sequence(MemoryLayout(2, 4, 5, torch.device("cpu")))
    added = torch.zeros(HEADS, 3, DIM)
    for layer in sequence.layers[:2]:
        layer.history.append(added, added)
    sequence.settle()
    assert lengths(sequence) == [TOKENS] * 4


def test_bytes_count_what_a_sequence_owns() -> None:
    sequence = refreshed()
    per_layer = 2 * HEADS * TOKENS * DIM * 4
    assert sequence.history_bytes == 4 * per_layer
    assert sequence.memory_bytes == 2 * 2 * HEADS * DIM * 4 * (4 + 2 + 5 + 4)
    child = SequenceState((None, None, 5, None), None, frozenset())
    sequence.share_history_with(child)
    assert (child.history_bytes, child.memory_bytes) == (0, 0)
    assert sequence.history_bytes == 4 * per_layer
