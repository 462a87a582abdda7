"""The history against a plain list of tokens, over any order of appends, cuts, forks and norms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from sfi_agent.engine import history as history_module
from sfi_agent.engine.history import LayerHistory

HEADS, DIM = 2, 3


def vectors(tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values `[heads, tokens, dim]` that tell which token they are."""
    number = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    head = torch.arange(HEADS, dtype=torch.float32)[:, None, None]
    place = torch.arange(DIM, dtype=torch.float32)[None, None]
    keys = number + 0.1 * head + 0.01 * place
    return keys, -keys


def assert_holds(history: LayerHistory, tokens: list[int]) -> None:
    assert history.tokens == len(tokens)
    if not tokens:
        assert list(history.pieces()) == []
        return
    keys, values = vectors(tokens)
    whole = history.joined(0, len(tokens))
    assert torch.equal(whole.keys, keys)
    assert torch.equal(whole.values, values)
    assert all(extent.tokens for extent in history.extents), "an empty extent"
    torch.testing.assert_close(history.key_norms(0, len(tokens)), keys.norm(dim=-1))


@pytest.fixture(autouse=True)
def _buffers_grow_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MINIMUM_GROWTH_TOKENS", 2)


class HistoryMachine(RuleBasedStateMachine):
    """A family of histories, each beside the list of tokens it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: Iterator[int] = count(1)
        self.family: list[tuple[LayerHistory, list[int]]] = []

    @initialize(reserve=st.sampled_from([0, 5]))
    def begin(self, reserve: int) -> None:
        self.family = [(LayerHistory(reserve), [])]

    def pick(self, number: int) -> tuple[LayerHistory, list[int]]:
        return self.family[number % len(self.family)]

    @rule(number=st.integers(0, 9), new=st.integers(1, 6))
    def append(self, number: int, new: int) -> None:
        history, tokens = self.pick(number)
        added = [next(self.fresh) for _ in range(new)]
        history.append(*vectors(added))
        tokens.extend(added)
        # What is appended at once lies in one piece: a block of rows attends to itself.
        assert list(history.pieces())[-1].keys.shape[1] >= new

    @rule(number=st.integers(0, 9), share=st.floats(0, 1))
    def cut(self, number: int, share: float) -> None:
        history, tokens = self.pick(number)
        del tokens[int(share * len(tokens)) :]
        history.cut(len(tokens))

    @rule(number=st.integers(0, 9))
    def fork(self, number: int) -> None:
        if len(self.family) < 5:
            history, tokens = self.pick(number)
            child = history.fork()
            assert child.owned_bytes == 0
            self.family.append((child, list(tokens)))

    @rule(number=st.integers(0, 9), first=st.floats(0, 1), last=st.floats(0, 1))
    def look(self, number: int, first: float, last: float) -> None:
        history, tokens = self.pick(number)
        start, end = sorted((int(first * len(tokens)), int(last * len(tokens))))
        if start < end:
            piece = history.joined(start, end)
            assert piece.start == start
            assert torch.equal(piece.keys, vectors(tokens[start:end])[0])
            starts = [piece.start for piece in history.pieces(start, end)]
            assert starts == sorted(set(starts))
            norms = history.key_norms(start, end)
            torch.testing.assert_close(norms, vectors(tokens[start:end])[0].norm(dim=-1))

    @invariant()
    def every_history_holds_its_tokens(self) -> None:
        for history, tokens in self.family:
            assert_holds(history, tokens)


def test_any_order_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        HistoryMachine,
        settings=settings(
            max_examples=60, stateful_step_count=25, derandomize=True, deadline=None, database=None
        ),
    )


def test_a_history_that_never_forked_is_one_piece() -> None:
    history = LayerHistory()
    for start in range(0, 40, 4):
        history.append(*vectors(list(range(start, start + 4))))
    assert len(list(history.pieces())) == 1


def test_reserved_tokens_are_allocated_at_once() -> None:
    history = LayerHistory(reserve_tokens=50)
    history.append(*vectors([1]))
    address, size = history.extents[0].buffer.keys.data_ptr(), history.owned_bytes
    history.append(*vectors(list(range(2, 51))))
    assert history.extents[0].buffer.keys.data_ptr() == address
    assert history.owned_bytes == size == 2 * HEADS * 50 * DIM * 4


def test_growth_is_by_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    history = LayerHistory()
    history.append(*vectors(list(range(80))))
    history.append(*vectors([80]))
    assert history.extents[0].buffer.capacity == 90
    monkeypatch.setattr(history_module, "MINIMUM_GROWTH_TOKENS", 64)
    history.append(*vectors(list(range(81, 91))))
    assert history.extents[0].buffer.capacity == 154


def test_a_fork_copies_nothing_and_growth_leaves_it_its_buffer() -> None:
    parent = LayerHistory()
    parent.append(*vectors([1, 2, 3]))
    child = parent.fork()
    shared = child.extents[0].buffer.keys.data_ptr()
    assert shared == parent.extents[0].buffer.keys.data_ptr()
    parent.append(*vectors([4, 5, 6, 7, 8]))
    assert parent.extents[0].buffer.keys.data_ptr() != shared
    assert child.extents[0].buffer.keys.data_ptr() == shared
    assert_holds(child, [1, 2, 3])


def test_a_parent_cut_below_what_its_fork_reads_starts_a_new_extent() -> None:
    parent = LayerHistory()
    parent.append(*vectors([1, 2, 3, 4]))
    child = parent.fork()
    parent.cut(2)
    parent.append(*vectors([9]))
    assert len(parent.extents) == 2
    assert_holds(parent, [1, 2, 9])
    assert_holds(child, [1, 2, 3, 4])


def test_a_parent_goes_on_behind_what_its_fork_reads_in_the_same_buffer() -> None:
    parent = LayerHistory(reserve_tokens=10)
    parent.append(*vectors([1, 2, 3]))
    child = parent.fork()
    parent.append(*vectors([4]))
    parent.cut(3)
    parent.append(*vectors([5]))
    assert len(parent.extents) == 1
    assert_holds(child, [1, 2, 3])
    assert_holds(parent, [1, 2, 3, 5])


def test_norms_are_computed_once_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    history = LayerHistory(reserve_tokens=100)
    history.append(*vectors(list(range(10))))
    asked: list[int] = []
    norm = torch.linalg.vector_norm

    def counting(keys: Tensor, **options: object) -> Tensor:
        asked.append(keys.shape[1])
        result: Tensor = norm(keys, **options)
        return result

    monkeypatch.setattr(torch.linalg, "vector_norm", counting)
    history.key_norms(0, 10)
    history.append(*vectors([10, 11]))
    history.key_norms(3, 12)
    history.fork().key_norms(0, 12)
    assert asked == [10, 2]
    history.cut(5)
    history.append(*vectors([50]))
    history.key_norms(0, 6)
    # The fork still reads twelve; the parent's new extent has one token.
    assert asked == [10, 2, 1]


def test_norms_after_a_cut_are_those_of_the_new_tokens() -> None:
    history = LayerHistory(reserve_tokens=100)
    history.append(*vectors([1, 2, 3, 4]))
    history.key_norms(0, 4)
    history.cut(2)
    history.append(*vectors([70, 80]))
    assert_holds(history, [1, 2, 70, 80])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_of_other_keys_are_float32(dtype: torch.dtype) -> None:
    history = LayerHistory()
    keys = torch.full((HEADS, 4, 64), 3.0, dtype=dtype)
    history.append(keys, keys)
    norms = history.key_norms(0, 4)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((HEADS, 4), 24.0))


def test_cutting_more_than_is_there_is_our_own_mistake() -> None:
    history = LayerHistory()
    history.append(*vectors([1]))
    with pytest.raises(AssertionError):
        history.cut(2)
