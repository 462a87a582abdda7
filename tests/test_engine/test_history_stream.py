"""Histories in host memory against plain lists of tokens, and how they come to the device.

Copies happen as late as they may (`LateLane`): what is read before somebody waited for it is wrong.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs
from torch import Tensor

from sfi_agent.engine import history as history_module
from sfi_agent.engine import history_stream as stream_module
from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.copy_lanes import Mark
from sfi_agent.engine.history import LayerHistory, Piece
from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.host_history import HostStore, carve, next_power
from sfi_agent.engine.sdpa import RunningSoftmax, attend_history, attend_passing
from tests.test_engine.host_cases import CPU, HostWays, LateLane
from tests.test_engine.test_history import DIM, HEADS, vectors
from tests.test_engine.test_sdpa import by_the_book, causal, draw

TOKEN_BYTES = 2 * HEADS * DIM * 4
few = settings(max_examples=80, derandomize=True, deadline=None, database=None)


@pytest.fixture(autouse=True)
def _buffers_grow_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "MINIMUM_GROWTH_TOKENS", 2)


def ways(room_tokens: int, rooms: int = 2, chunk_tokens: int = 4) -> HostWays:
    """Rooms and chunks of a few tokens of this file's size."""
    return HostWays(room_tokens * TOKEN_BYTES, rooms, chunk_tokens * TOKEN_BYTES // 2)


def received(stream: HistoryStream, history: LayerHistory, tokens: int) -> list[int]:
    """Token numbers in the order of their positions, checked in keys and values."""
    found: dict[int, float] = {}
    for piece in stream.pieces(history, tokens):
        numbers = [float(number) for number in piece.keys[0, :, 0].round()]
        keys, values = vectors([int(number) for number in numbers])
        assert torch.equal(piece.keys, keys) and torch.equal(piece.values, values)
        found |= dict(zip(count(piece.start), numbers, strict=False))
    assert sorted(found) == list(range(tokens))
    return [int(found[position]) for position in range(tokens)]


class HostHistoryMachine(RuleBasedStateMachine):
    """A family of histories, on the host or not, each beside the tokens it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: Iterator[int] = count(1)
        self.family: list[tuple[LayerHistory, list[int]]] = []

    @initialize(
        reserve=st.sampled_from([0, 7]),
        chunk=st.integers(1, 9),
        room=st.integers(1, 12),
        rooms=st.integers(1, 3),
    )
    def begin(self, reserve: int, chunk: int, room: int, rooms: int) -> None:
        kept = ways(room, rooms, chunk)
        self.store, self.stream = kept.store(), kept.stream()
        self.family = [(LayerHistory(reserve, self.store), [])]

    def pick(self, number: int) -> tuple[LayerHistory, list[int]]:
        return self.family[number % len(self.family)]

    @rule(number=st.integers(0, 9), new=st.integers(1, 11))
    def append(self, number: int, new: int) -> None:
        history, tokens = self.pick(number)
        added = [next(self.fresh) for _ in range(new)]
        keys, values = vectors(added)
        history.append(keys, values)
        # The memory that they came from is written again at once.
        keys.fill_(-1.0)
        values.fill_(-1.0)
        tokens.extend(added)

    @rule(number=st.integers(0, 9), share=st.floats(0, 1))
    def cut(self, number: int, share: float) -> None:
        history, tokens = self.pick(number)
        del tokens[int(share * len(tokens)) :]
        history.cut(len(tokens))

    @rule(number=st.integers(0, 9), elsewhere=st.booleans())
    def fork(self, number: int, elsewhere: bool) -> None:
        """A child may keep what it adds where its parent does not."""
        if len(self.family) < 5:
            history, tokens = self.pick(number)
            child = history.fork()
            child.store = history.store
            if elsewhere:
                child.store = None if history.store is not None else self.store
            assert child.owned_bytes == 0
            self.family.append((child, list(tokens)))

    @rule(first=st.floats(0, 1), last=st.floats(0, 1), number=st.integers(0, 9))
    def look(self, first: float, last: float, number: int) -> None:
        history, tokens = self.pick(number)
        start, end = sorted((int(first * len(tokens)), int(last * len(tokens))))
        if start < end:
            keys, values = vectors(tokens[start:end])
            piece = history.joined(start, end)
            assert torch.equal(piece.keys, keys) and torch.equal(piece.values, values)
            torch.testing.assert_close(history.key_norms(start, end), keys.norm(dim=-1))

    @rule(kept=st.lists(st.integers(0, 9), min_size=1, max_size=4), swap=st.booleans())
    def stream_some(self, kept: list[int], swap: bool) -> None:
        """Several in one pass, in the order that was said or in another one."""
        asked = [self.pick(number) for number in kept]
        with self.stream.reading([history for history, _ in asked if history.streamed]):
            for history, tokens in reversed(asked) if swap else asked:
                if history.streamed:
                    assert received(self.stream, history, len(tokens)) == tokens

    @rule(number=st.integers(0, 9), asked=st.integers(0, 3))
    def stop_in_between(self, number: int, asked: int) -> None:
        history, tokens = self.pick(number)
        if history.streamed:
            with self.stream.reading([history, history]):
                pieces = self.stream.pieces(history, len(tokens))
                for _, piece in zip(range(asked), pieces, strict=False):
                    assert piece.keys.shape[1]

    @invariant()
    def every_history_holds_its_tokens(self) -> None:
        for history, tokens in self.family:
            assert history.tokens == len(tokens)
            assert all(extent.tokens for extent in history.extents), "an empty extent"
            if history.streamed:
                assert received(self.stream, history, len(tokens)) == tokens


def test_any_order_of_operations() -> None:
    run_state_machine_as_test(
        HostHistoryMachine,
        settings=settings(
            max_examples=50, stateful_step_count=20, derandomize=True, deadline=None, database=None
        ),
    )


# ---------------------------------------------------------------- the stream


@few
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    room=st.integers(1, 40),
    rooms=st.integers(1, 3),
    chunk=st.integers(1, 20),
)
def test_a_token_travels_once_and_while_others_are_read(
    lengths: list[int], room: int, rooms: int, chunk: int
) -> None:
    """What is not waited for has not come; nothing comes twice; rooms stay within their bytes."""
    kept, lane = ways(room, rooms, chunk), LateLane()
    store = kept.store()
    stream = HistoryStream(CPU, lane, room_bytes=kept.room_bytes, rooms=rooms)
    layers = []
    for length in lengths:
        layers.append(LayerHistory(store=store))
        layers[-1].append(*vectors(list(range(1, length + 1))))
    with stream.reading(layers):
        for layer, length in zip(layers, lengths, strict=True):
            assert received(stream, layer, length) == list(range(1, length + 1))
    assert lane.copied == sum(lengths) * TOKEN_BYTES // 4
    assert stream.device_bytes <= rooms * (max(TOKEN_BYTES, kept.room_bytes) + 256)


def test_pieces_of_the_next_layer_travel_while_this_one_is_read() -> None:
    given_at: list[int] = []

    class Counting(LateLane):
        def copy(self, *arguments: object) -> object:  # type: ignore[override]
            given_at.append(reading)
            return super().copy(*arguments)  # type: ignore[arg-type]

    kept, reading = ways(4), 0
    store = kept.store()
    layers = [LayerHistory(store=store) for _ in range(3)]
    for layer in layers:
        layer.append(*vectors([1, 2, 3, 4, 5, 6, 7, 8]))
    stream = HistoryStream(CPU, Counting(), room_bytes=kept.room_bytes)  # type: ignore[arg-type]
    with stream.reading(layers):
        for index, layer in enumerate(layers):
            reading = index
            assert received(stream, layer, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    # Two loads per layer: both of a layer are under way before the layer asks for them.
    assert given_at == [0, 0, 0, 0, 1, 1]


def test_keys_alone_travel_where_values_are_not_wanted() -> None:
    lane = LateLane()
    stream, layer = HistoryStream(CPU, lane), LayerHistory(store=HostStore(CPU))
    layer.append(*vectors([1, 2, 3]))
    with stream.reading([layer], with_values=False):
        (piece,) = stream.pieces(layer, 3)
        assert torch.equal(piece.keys, vectors([1, 2, 3])[0]) and not piece.values.numel()
    assert lane.copied == 3 * TOKEN_BYTES // 8


def test_rooms_grow_with_histories_and_no_further() -> None:
    stream, layer = ways(1000).stream(), LayerHistory(store=HostStore(CPU))
    assert stream.device_bytes == 0
    layer.append(*vectors([1]))
    assert received(stream, layer, 1) == [1]
    small = stream.device_bytes
    layer.append(*vectors(list(range(2, 900))))
    assert received(stream, layer, 899) == list(range(1, 900))
    assert small < stream.device_bytes <= 2 * (1000 * TOKEN_BYTES + 256)
    grown = stream.device_bytes
    assert received(stream, layer, 1) == [1] and stream.device_bytes == grown


def test_rooms_are_smaller_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerHistory(store=HostStore(CPU))
    layer.append(*vectors(list(range(1, 600))))
    monkeypatch.setattr(stream_module, "_LEAST_ROOM_BYTES", 16 * TOKEN_BYTES)
    monkeypatch.setattr(stream_module, "_room_share", lambda device: 200 * TOKEN_BYTES)
    stream = HistoryStream(CPU, room_bytes=1 << 20)
    assert received(stream, layer, 599) == list(range(1, 600))
    assert stream.device_bytes == 2 * (100 * TOKEN_BYTES + 256)

    room = HistoryStream._room
    asked: list[int] = []

    def short(self: HistoryStream, size: int) -> object:
        asked.append(size)
        if size > 40 * TOKEN_BYTES:
            raise torch.OutOfMemoryError("no room")
        return room(self, size)

    monkeypatch.setattr(HistoryStream, "_room", short)
    stream = HistoryStream(CPU, room_bytes=1 << 20)
    for _ in range(2):
        assert received(stream, layer, 599) == list(range(1, 600))
    assert len(asked) == 4 and stream.device_bytes <= 2 * 40 * TOKEN_BYTES
    monkeypatch.setattr(stream_module, "_LEAST_ROOM_BYTES", 64 * TOKEN_BYTES)
    with pytest.raises(torch.OutOfMemoryError):
        received(HistoryStream(CPU), layer, 599)


@dataclass
class _Clocked:
    """A mark that knows when it was made."""

    time: int

    def hold(self) -> None:
        return None

    def hold_lane(self, stream: object) -> None:
        return None

    def wait(self) -> None:
        return None


class _Clock:
    """A lane that notes which copies waited for what."""

    def __init__(self) -> None:
        self.time = 0
        self.read_at: dict[int, int] = {}

    def note(self) -> Mark:
        return _Clocked(self.time)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Mark:
        waited = max(mark.time for mark in after if isinstance(mark, _Clocked))
        for target, source in pairs:
            read_at = self.read_at.get(target.untyped_storage().data_ptr(), 0)
            assert waited >= read_at, "a room is filled while it is read"
            target.copy_(source)
        return _Clocked(self.time)


@few
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    room=st.integers(1, 12),
    rooms=st.integers(1, 3),
    left=st.integers(0, 9),
)
def test_rooms_are_filled_when_nothing_reads_them_any_more(
    lengths: list[int], room: int, rooms: int, left: int
) -> None:
    """On a device reads are only started when a piece is given out; a break may come anywhere."""
    kept, clock = ways(room, rooms), _Clock()
    stream = HistoryStream(CPU, clock, room_bytes=kept.room_bytes, rooms=rooms)
    layers = []
    for length in lengths:
        layers.append(LayerHistory(store=HostStore(CPU)))
        layers[-1].append(*vectors(list(range(length))))
    for stops in (left, -1):
        with stream.reading(layers):
            for layer in layers:
                for piece in stream.pieces(layer, layer.tokens):
                    clock.time += 1
                    clock.read_at[piece.keys.untyped_storage().data_ptr()] = clock.time
                    stops -= 1
                    if not stops:
                        break
    assert clock.time >= sum(lengths) / room


def test_rooms_are_given_back_when_nothing_travels_to_them() -> None:
    lane = LateLane()
    stream = HistoryStream(CPU, lane, room_bytes=1 << 20)
    short, long = LayerHistory(store=HostStore(CPU)), LayerHistory(store=HostStore(CPU))
    short.append(*vectors([1, 2, 3]))
    long.append(*vectors(list(range(900))))
    with stream.reading([short, short]):
        pass
    assert lane.pending == 2
    with stream.reading([long]):
        assert lane.pending == 1, "the copies to the smaller rooms are under way"


# ---------------------------------------------------------------- the store


def test_what_was_not_waited_for_has_not_arrived_and_readers_wait() -> None:
    """That the other tests can fail: a buffer is written behind the back of its history."""
    store = ways(4).store()
    history = LayerHistory(store=store)
    history.append(*vectors([1, 2]))
    buffer = history.extents[0].buffer
    buffer.keys.zero_()
    assert store.written is not None and not buffer.keys.any()
    assert torch.equal(history.joined(0, 2).keys, vectors([1, 2])[0])
    assert store.written is None


def test_threads_write_at_once() -> None:
    """Sessions close their segments in threads of their own, each when it likes."""

    class Slow:
        def note(self) -> Mark:
            return _Clocked(0)

        def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Mark]) -> Mark:
            for target, source in pairs:
                time.sleep(1e-4)
                target.copy_(source)
            return _Clocked(0)

    store = HostStore(CPU, Slow())
    histories = [LayerHistory(store=store) for _ in range(4)]

    def fill(index: int) -> None:
        for number in range(60):
            histories[index].append(*vectors([100 * index + number]))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fill, range(4)))
    for index, history in enumerate(histories):
        expected = vectors(list(range(100 * index, 100 * index + 60)))
        held = history.joined(0, 60)
        assert torch.equal(held.keys, expected[0]) and torch.equal(held.values, expected[1])


@few
@given(
    wanted=st.integers(1, 5000),
    heads=st.integers(1, 8),
    dims=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    largest=st.sampled_from([1, 100, 4096, 1 << 16]),
)
def test_chunks_fill_powers_of_two(
    wanted: int, heads: int, dims: tuple[int, int], largest: int
) -> None:
    """torch rounds pinned memory up to them: what is not used is less than a token."""
    store = HostStore(CPU, largest_chunk_bytes=largest)
    keys, values = (torch.empty(heads, 1, dim, dtype=torch.bfloat16) for dim in dims)
    tokens = store.capacity(keys, values, wanted)
    token_bytes = 2 * heads * max(dims)
    assert tokens >= 1 and (tokens == 1 or tokens * token_bytes <= largest)
    whole = min(next_power(wanted * token_bytes), largest)
    assert tokens == max(1, whole // token_bytes)
    assert tokens >= wanted or whole == largest or tokens == 1


def test_growth_adds_an_eighth_and_moves_nothing() -> None:
    history = LayerHistory(store=ways(4, chunk_tokens=1 << 12).store())
    history.append(*vectors(list(range(160))))
    before = [extent.buffer for extent in history.extents]
    addresses = [buffer.keys.data_ptr() for buffer in before]
    capacity = sum(buffer.capacity for buffer in before)
    history.append(*vectors(list(range(capacity - 160 + 1))))
    assert [extent.buffer for extent in history.extents][:-1] == before
    assert [buffer.keys.data_ptr() for buffer in before] == addresses
    fresh = history.extents[-1].buffer.capacity
    assert capacity // 8 <= fresh <= 2 * capacity // 8 + 1


def test_reserved_tokens_are_taken_at_once_and_counted() -> None:
    history = LayerHistory(50, ways(4, chunk_tokens=16).store())
    history.append(*vectors([1]))
    taken = history.owned_bytes
    assert 50 * TOKEN_BYTES <= taken <= 64 * TOKEN_BYTES
    history.append(*vectors(list(range(2, 51))))
    assert history.owned_bytes == taken and len(history.extents) > 2
    history.cut(3)
    assert history.owned_bytes == taken, "pinned memory is not given back by a rewind"
    history.append(*vectors(list(range(4, 51))))
    assert history.owned_bytes == taken
    assert torch.equal(history.joined(0, 50).keys, vectors(list(range(1, 51)))[0])


def test_buffers_are_freed_with_the_last_history_that_reads_them() -> None:
    parent = LayerHistory(store=ways(4).store())
    parent.append(*vectors(list(range(20))))
    child = parent.fork()
    buffers = [weakref.ref(extent.buffer) for extent in parent.extents]
    del parent
    gc.collect()
    assert all(buffer() is not None for buffer in buffers)
    del child
    gc.collect()
    assert all(buffer() is None for buffer in buffers)


def test_memory_that_cannot_be_pinned_is_said_and_used_as_it_is() -> None:
    store = HostStore(CPU, pin=True)
    history = LayerHistory(store=store)
    with capture_logs() as logs:
        history.append(*vectors([1, 2, 3]))
        history.append(*vectors(list(range(4, 40))))
    (said,) = [entry for entry in logs if entry["event"] == "pinned_memory_missing"]
    assert said["log_level"] == "warning" and said["reason"] and not store.pins
    assert torch.equal(history.joined(0, 39).keys, vectors(list(range(1, 40)))[0])


def test_rooms_carve_tensors_of_any_type() -> None:
    room = torch.zeros(1024, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        made = carve(room, 256, (2, 3, 4), dtype)
        made.fill_(3)
        assert made.dtype == dtype and made.is_contiguous()
        assert made.data_ptr() == room.data_ptr() + 256
    assert [next_power(number) for number in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]


# ---------------------------------------------------------------- attention


@few
@given(
    past=st.lists(st.integers(1, 40), max_size=5),
    rows=st.integers(1, 9),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dim=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_passing_pieces_are_one_softmax(
    past: list[int], rows: int, heads: tuple[int, int], dim: int, seed: int
) -> None:
    """In any order, against the whole history at once; every token is shown once."""
    total = sum(past) + rows
    query = draw(seed, heads[0], rows, dim, dtype=torch.float32)
    keys, values = (draw(seed + n, heads[1], total, dim, dtype=torch.float32) for n in (1, 2))
    cuts = [0]
    for length in past:
        cuts.append(cuts[-1] + length)
    pieces = [Piece(a, keys[:, a:b], values[:, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    own = Piece(cuts[-1], keys[:, cuts[-1] :], values[:, cuts[-1] :])
    shown: list[int] = []

    def look(piece: Piece) -> None:
        shown.extend(range(piece.start, piece.start + piece.keys.shape[1]))

    got = attend_passing(query, reversed(pieces), own, AttentionRule(0.3), look)
    expected = by_the_book(query, keys, values, 0.3, causal(rows, total))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    whole = attend_history(query, [Piece(0, keys, values)], AttentionRule(0.3))
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
    assert sorted(shown) == list(range(total))


def test_a_running_softmax_keeps_float32_between_half_precision_parts() -> None:
    outs = draw(1, 40, 2, 3, 8, dtype=torch.bfloat16)
    lses = draw(2, 40, 2, 3, dtype=torch.float32) * 3
    softmax = RunningSoftmax()
    for out, lse in zip(outs, lses, strict=True):
        softmax.add(out, lse)
    expected = (outs.double() * lses.double().softmax(0)[..., None]).sum(0)
    got, lse = softmax.result()
    assert got.dtype == torch.float32
    torch.testing.assert_close(lse, lses.logsumexp(0))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
