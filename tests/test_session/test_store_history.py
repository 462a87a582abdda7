"""Histories that come out of files, against plain lists of tokens: same tokens, same extents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from sfi_agent.engine import history as history_module
from sfi_agent.engine import saved_history as saved_module
from sfi_agent.engine.host_history import HostStore
from sfi_agent.engine.saved_history import (
    HistoryForm,
    LayerSizes,
    SavedBuffer,
    SavedPart,
    form_of,
    history_parts,
    layer_sizes,
    restore_history,
)
from sfi_agent.engine.sequence import SequenceState

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5
CPU = torch.device("cpu")


def vectors(tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values that tell which token they are."""
    number = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    head = torch.arange(HEADS, dtype=torch.float32)[:, None, None]
    keys = number + 0.1 * head + 0.01 * torch.arange(KEY_DIM)[None, None]
    return keys, -number - 0.1 * head - 0.01 * torch.arange(VALUE_DIM)[None, None]


def parts_of(tokens: list[int], cuts: list[int]) -> list[SavedPart]:
    edges = sorted({0, len(tokens), *(cut % max(1, len(tokens)) for cut in cuts)})
    return [
        SavedPart(*vectors(tokens[low:high])) for low, high in zip(edges, edges[1:], strict=False)
    ]


def restored(
    tokens: list[int], part_cuts: list[int], extents: tuple[int, ...], continues: bool
) -> tuple[SequenceState, list[SavedPart]]:
    sequence = SequenceState((None,), None, frozenset())
    parts = parts_of(tokens, part_cuts)
    restore_history(sequence, [parts], HistoryForm(extents, continues), CPU)
    return sequence, parts


def split(tokens: int, cuts: list[int]) -> tuple[int, ...]:
    edges = sorted({0, tokens, *(cut % tokens for cut in cuts)})
    return tuple(high - low for low, high in zip(edges, edges[1:], strict=False))


@pytest.fixture(autouse=True)
def _buffers_grow_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MINIMUM_GROWTH_TOKENS", 2)
    monkeypatch.setattr(saved_module, "MINIMUM_GROWTH_TOKENS", 2)


class SavedHistoryMachine(RuleBasedStateMachine):
    """A history out of files beside one that was appended to: extents move the same way."""

    @initialize(
        count=st.integers(1, 12),
        part_cuts=st.lists(st.integers(0, 11), max_size=3),
        extent_cuts=st.lists(st.integers(0, 11), max_size=2),
        continues=st.booleans(),
    )
    def begin(
        self, count: int, part_cuts: list[int], extent_cuts: list[int], continues: bool
    ) -> None:
        tokens = list(range(1, count + 1))
        extents = split(count, extent_cuts)
        sequence, self.parts = restored(tokens, part_cuts, extents, continues)
        self.before = [(part.keys.clone(), part.values.clone()) for part in self.parts]
        self.fresh = count
        self.family = [(sequence.layers[0].history, tokens, list(extents))]
        self.ends = [continues]

    @rule(number=st.integers(0, 9), new=st.integers(1, 4))
    def append(self, number: int, new: int) -> None:
        index = number % len(self.family)
        history, tokens, extents = self.family[index]
        added = list(range(self.fresh + 1, self.fresh + new + 1))
        self.fresh += new
        history.append(*vectors(added))
        tokens.extend(added)
        if extents and self.ends[index]:
            extents[-1] += new
        else:
            extents.append(new)
        self.ends[index] = True

    @rule(number=st.integers(0, 9), dropped=st.integers(1, 3))
    def cut_its_own_tail(self, number: int, dropped: int) -> None:
        index = number % len(self.family)
        history, tokens, extents = self.family[index]
        if not extents or extents[-1] <= dropped or len(self.family) > 1:
            return
        del tokens[len(tokens) - dropped :]
        extents[-1] -= dropped
        history.cut(len(tokens))

    @rule(number=st.integers(0, 9))
    def fork(self, number: int) -> None:
        index = number % len(self.family)
        history, tokens, extents = self.family[index]
        if len(self.family) < 3:
            child = history.fork()
            assert child.owned_bytes == 0
            self.family.append((child, list(tokens), list(extents)))
            self.ends.append(False)

    @invariant()
    def every_history_holds_its_tokens_in_its_extents(self) -> None:
        for history, tokens, extents in self.family:
            assert history.tokens == len(tokens)
            assert [extent.tokens for extent in history.extents] == extents
            keys, values = vectors(tokens)
            parts = list(history_parts(history, 0, len(tokens)))
            assert torch.equal(torch.cat([part.keys for part in parts], 1), keys)
            assert torch.equal(torch.cat([part.values for part in parts], 1), values)

    @rule(number=st.integers(0, 9))
    def read(self, number: int) -> None:
        history, tokens, _ = self.family[number % len(self.family)]
        whole = history.joined(0, len(tokens))
        assert torch.equal(whole.keys, vectors(tokens)[0])
        torch.testing.assert_close(history.key_norms(0, len(tokens)), whole.keys.norm(dim=-1))

    @invariant()
    def nothing_is_written_where_the_files_are(self) -> None:
        for part, (keys, values) in zip(self.parts, self.before, strict=True):
            assert torch.equal(part.keys, keys) and torch.equal(part.values, values)


def test_any_order_of_operations() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        SavedHistoryMachine,
        settings=settings(max_examples=40, stateful_step_count=12, deadline=None, database=None),
    )


def test_loading_and_looking_at_sizes_touches_nothing() -> None:
    sequence, _ = restored(list(range(9)), [2, 5], (9,), True)
    history = sequence.layers[0].history
    buffer: Any = history.extents[0].buffer
    assert isinstance(buffer, SavedBuffer)
    assert history.owned_bytes == 0 and sequence.history_bytes == 0
    assert layer_sizes(history) == LayerSizes(HEADS, KEY_DIM, VALUE_DIM, torch.float32)
    assert form_of(sequence) == HistoryForm((9,), True)
    assert len(list(history_parts(history, 1, 8))) == 3
    assert not {"keys", "values"} & set(vars(buffer)), "something was joined"
    with pytest.raises(AttributeError, match="no attribute 'key'"):
        _ = buffer.key


def test_forks_share_what_is_joined_once() -> None:
    sequence, _ = restored(list(range(9)), [2, 5], (9,), True)
    children = [sequence.layers[0].history.fork() for _ in range(3)]
    places = {next(child.pieces()).keys.data_ptr() for child in children}
    assert len(places) == 1


def test_forks_read_a_single_file_where_it_is() -> None:
    sequence, parts = restored(list(range(9)), [], (9,), True)
    child = sequence.layers[0].history.fork()
    assert next(child.pieces()).keys.data_ptr() == parts[0].keys.data_ptr()
    child.append(*vectors([10]))
    assert next(child.pieces()).keys.data_ptr() == parts[0].keys.data_ptr()
    assert child.owned_bytes < sum(part.keys.nbytes + part.values.nbytes for part in parts)


def test_the_history_that_goes_on_moves_out_with_room_behind_it() -> None:
    sequence = SequenceState((None,), None, frozenset(), reserve_tokens=64)
    parts = parts_of(list(range(20)), [4])
    restore_history(sequence, [parts], HistoryForm((20,), True), CPU)
    history = sequence.layers[0].history
    history.append(*vectors([20]))
    assert history.extents[0].buffer.capacity == 64
    before = sequence.moves.count
    history.append(*vectors([21, 22]))
    assert sequence.moves.count == before, "it moved again"


@given(cuts=st.lists(st.integers(0, 19), max_size=3))
@settings(max_examples=10, deadline=None, database=None)
def test_host_memory_takes_the_tokens_in_chunks_of_its_own(cuts: list[int]) -> None:
    store = HostStore(CPU, largest_chunk_bytes=64)
    sequence = SequenceState((None,), None, frozenset(), store=store)
    tokens = list(range(1, 21))
    restore_history(sequence, [parts_of(tokens, cuts)], HistoryForm((20,), True), CPU)
    history = sequence.layers[0].history
    assert len(history.extents) > 1 and sequence.processed_tokens == 20
    assert form_of(sequence) == HistoryForm((20,), True)
    whole = history.joined(0, 20)
    assert torch.equal(whole.keys, vectors(tokens)[0])


def test_another_device_gets_one_buffer_per_layer() -> None:
    sequence = SequenceState((None, 4), None, frozenset())
    parts = parts_of(list(range(9)), [2, 5])
    restore_history(sequence, [parts, parts], HistoryForm((4, 5), False), torch.device("meta"))
    for layer in sequence.layers:
        (extent,) = layer.history.extents
        assert extent.owned and extent.tokens == 9 and extent.buffer.capacity > 9
        assert extent.buffer.keys.device.type == "meta"


def test_a_fork_that_was_saved_begins_an_extent_of_its_own() -> None:
    parent = SequenceState((None, None), None, frozenset())
    for layer in parent.layers:
        layer.history.append(*vectors([1, 2, 3]))
    parent.processed_tokens = 3
    child = SequenceState((None, None), None, frozenset())
    parent.share_history_with(child)
    assert form_of(parent) == HistoryForm((3,), True)
    assert form_of(child) == HistoryForm((3,), False)
    child.layers[0].history.append(*vectors([4]))
    child.layers[1].history.append(*vectors([4]))
    assert form_of(child) == HistoryForm((3, 1), True)
    parent.cut(2)
    assert form_of(parent) == HistoryForm((2,), False), "others read what it would write over"
    assert form_of(SequenceState((None,), None, frozenset())) == HistoryForm((), True)
