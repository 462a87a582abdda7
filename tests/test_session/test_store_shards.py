"""Shards: what safetensors finds in them, digests that see every bit, files that are refused."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfi_agent import StoreError
from sfi_agent.engine.saved_history import LayerSizes, SavedPart
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.session.store import shard_reading, shard_writing
from sfi_agent.session.store.digests import as_bytes, digest_of
from sfi_agent.session.store.directory import StoreDirectory
from sfi_agent.session.store.manifest import SavedHistory, SavedLayer, SavedStretch
from sfi_agent.session.store.shard_form import DTYPE_NAMES, ShardForm, dtype_named, grouped
from sfi_agent.session.store.shard_reading import map_layers, open_shards, verify_shards
from sfi_agent.session.store.shard_writing import write_stretch

DTYPES = [dtype_named(name) for name in DTYPE_NAMES]
few = settings(
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

sizes = st.builds(
    LayerSizes,
    st.integers(1, 3),
    st.sampled_from([1, 4, 12]),
    st.sampled_from([1, 3, 16]),
    st.sampled_from(DTYPES),
)


def sequence_of(layers: list[LayerSizes], tokens: int, chunks: list[int]) -> SequenceState:
    """Random numbers of every bit pattern, appended bit by bit."""
    sequence = SequenceState((None,) * len(layers), None, frozenset())
    for state, size in zip(sequence.layers, layers, strict=True):
        left = tokens
        for chunk in [*chunks, tokens]:
            new = min(chunk, left)
            if new:
                pair = (
                    random_bits(size, new, size.key_dim),
                    random_bits(size, new, size.value_dim),
                )
                state.history.append(*pair)
                left -= new
    sequence.processed_tokens = tokens
    return sequence


def random_bits(size: LayerSizes, tokens: int, dim: int) -> Tensor:
    count = size.kv_heads * tokens * dim * size.dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8)
    return raw.view(size.dtype).view(size.kv_heads, tokens, dim)


def written(folder: Path, sequence: SequenceState, start: int, end: int) -> SavedStretch:
    with StoreDirectory.opened(folder, create=True) as store:
        return write_stretch(store, sequence, start, end)


def history_with(sequence: SequenceState, *stretches: SavedStretch) -> SavedHistory:
    layers = []
    for layer in sequence.layers:
        piece = next(layer.history.pieces())
        heads, _, key_dim = piece.keys.shape
        value_dim = piece.values.shape[-1]
        saved = SavedLayer(kv_heads=heads, key_dim=key_dim, value_dim=value_dim, window=None)
        layers.append(saved)
    return SavedHistory(
        layers=tuple(layers),
        extents=(sum(stretch.tokens for stretch in stretches),),
        continues_last=True,
        stretches=stretches,
    )


def read_back(
    folder: Path, history: SavedHistory, layers: list[LayerSizes], *, verify: bool = True
) -> list[list[SavedPart]]:
    with StoreDirectory.opened(folder) as store, open_shards(store, history, layers) as shards:
        if verify:
            verify_shards(shards)
        return map_layers(shards, len(layers))


def bits(tensor: Tensor) -> bytes:
    return as_bytes(tensor).numpy().tobytes()


@given(
    layers=st.lists(sizes, min_size=1, max_size=5),
    tokens=st.integers(1, 40),
    chunks=st.lists(st.integers(1, 9), max_size=3),
    start=st.floats(0, 0.99),
    used=st.floats(0.01, 1),
    cap=st.sampled_from([1, 500, 1 << 29]),
    chunk_bytes=st.sampled_from([64, 1000, 1 << 22]),
    direct_bytes=st.sampled_from([1, 40, 1 << 16]),
    written_at_once=st.sampled_from([1, 7, 1 << 30]),
)
@few
def test_what_is_written_is_read_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[LayerSizes],
    tokens: int,
    chunks: list[int],
    start: float,
    used: float,
    cap: int,
    chunk_bytes: int,
    direct_bytes: int,
    written_at_once: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    sequence, first = sequence_of(layers, tokens, chunks), int(start * tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writing, "LARGEST_SHARD_BYTES", cap)
        for module in (shard_writing, shard_reading):
            patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(shard_writing, "_LEAST_DIRECT_BYTES", direct_bytes)
        patch.setattr(os, "writev", partly(os.writev, written_at_once))
        stretch = written(folder, sequence, first, tokens)
        shown = max(1, int(used * stretch.tokens))
        cut = SavedStretch(tokens=shown, held_tokens=stretch.held_tokens, shards=stretch.shards)
        parts = read_back(folder, history_with(sequence, cut), layers)
    if cap == 1:
        assert len(stretch.shards) == len(layers)
    for state, (part,) in zip(sequence.layers, parts, strict=True):
        whole = state.history.joined(first, first + shown)
        assert bits(part.keys) == bits(whole.keys)
        assert bits(part.values) == bits(whole.values)


def partly(real: Callable[..., int], most_bytes: int) -> Callable[..., int]:
    """As a system that takes a part of what it is given."""

    def writev(descriptor: int, pieces: list[memoryview]) -> int:
        return real(descriptor, [b"".join(pieces)[:most_bytes]])

    return writev


@given(layers=st.lists(sizes, min_size=1, max_size=3), tokens=st.integers(1, 30))
@few
def test_the_safetensors_library_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, layers: list[LayerSizes], tokens: int
) -> None:
    from safetensors import safe_open

    folder = tmp_path_factory.mktemp("shards")
    sequence = sequence_of(layers, tokens, [])
    stretch = written(folder, sequence, 0, tokens)
    found: dict[str, Tensor] = {}
    for shard in stretch.shards:
        assert (folder / shard.name).stat().st_size == shard.bytes
        with safe_open(folder / shard.name, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    assert len(found) == 2 * len(layers)
    for index, state in enumerate(sequence.layers):
        whole = state.history.joined(0, tokens)
        for name, tensor in (("keys", whole.keys), ("values", whole.values)):
            mine = found[f"layers.{index}.{name}"]
            assert mine.dtype == tensor.dtype and mine.shape == tensor.shape
            assert bits(mine) == bits(tensor)


@given(layers=st.lists(sizes, min_size=1, max_size=9), cap=st.integers(1, 3000))
@few
def test_groups_hold_all_layers_and_stay_below_the_cap(layers: list[LayerSizes], cap: int) -> None:
    forms = grouped(layers, 7, cap)
    assert [size for form in forms for size in form.layers] == layers
    assert [form.first_layer for form in forms] == [
        sum(len(form.layers) for form in forms[:index]) for index in range(len(forms))
    ]
    for form in forms:
        assert form.bytes - len(form.header) <= cap or len(form.layers) == 1
        assert len(form.header) % 64 == 0
        assert form.places()[0].offset == len(form.header)


# ---------------------------------------------------------------- digests


@given(count=st.integers(1, 40_000), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None, database=None)
def test_every_bit_counts_for_a_digest(count: int, place: float, bit: int) -> None:
    data = torch.randint(0, 256, (count,), dtype=torch.uint8)
    other = data.clone()
    other[int(place * count)] ^= 1 << bit
    assert digest_of(data) == digest_of(data.clone())
    assert digest_of(data) != digest_of(other)


@given(
    rows=st.integers(2, 5),
    moved=st.lists(st.integers(0, 5 * 1024 - 1), min_size=2, max_size=2, unique=True),
    length=st.integers(1, 1024),
)
@settings(max_examples=60, deadline=None, database=None)
def test_places_count_for_a_digest(rows: int, moved: list[int], length: int) -> None:
    """Two runs of words that are exchanged, as when sectors of a disk are mixed up."""
    words = torch.randint(-(2**62), 2**62, (rows * 1024,))
    low, high = sorted(place % (rows * 1024) for place in moved)
    size = min(length, high - low, rows * 1024 - high)
    if not size:
        return
    other = words.clone()
    other[low : low + size], other[high : high + size] = (
        words[high : high + size],
        words[low : low + size],
    )
    assert digest_of(as_bytes(words)) != digest_of(as_bytes(other))


def test_lengths_count_for_a_digest_and_strides_do_not() -> None:
    data = torch.zeros(8192 * 2, dtype=torch.uint8)
    digests = {digest_of(data[:count]) for count in (0, 1, 8191, 8192, 8193, 16384)}
    assert len(digests) == 6
    shifted = torch.randint(0, 256, (8192 * 2 + 3,), dtype=torch.uint8)
    assert digest_of(shifted[3:]) == digest_of(shifted[3:].clone())
    square = torch.randn(40, 60)
    assert digest_of(as_bytes(square.T)) == digest_of(as_bytes(square.T.contiguous()))
    assert digest_of(as_bytes(square.T)) != digest_of(as_bytes(square))


GOLDEN = {
    0: "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",
    5: "d5f50a7c424c0df44078b14639d58e17c9f3c7c582bd15be7d7b6c2323c622e5",
    8_192: "379f51b177ba3755d0781711f0b683549046c57d676934a2bc261fc958dcab7a",
    100_003: "fd2c5eb768e0e7331466c99ab9591ec2537d9befab4af0f3aa267faff67db408",
}


def test_a_digest_is_what_is_in_the_files_of_earlier_versions() -> None:
    for count, digest in GOLDEN.items():
        assert digest_of((torch.arange(count) * 7 % 251).to(torch.uint8)).hex() == digest


@given(
    counts=st.lists(st.one_of(st.integers(0, 70), st.integers(8_000, 9_000)), max_size=9),
    more=st.integers(0, 700_000),
)
@settings(max_examples=60, deadline=None, database=None)
def test_a_digest_does_not_tell_where_pieces_end(counts: list[int], more: int) -> None:
    data = torch.randint(0, 256, (sum(counts) + more,), dtype=torch.uint8)
    pieces = data.split([*counts, more])
    assert digest_of(*pieces) == digest_of(data) == digest_of(*pieces, data[:0])


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[Path, SavedHistory, list[LayerSizes], Path]]:
    layers = [LayerSizes(2, 4, 3, torch.float32)] * 2
    sequence = sequence_of(layers, 20, [])
    stretch = written(tmp_path, sequence, 0, 20)
    file = tmp_path / stretch.shards[0].name
    yield tmp_path, history_with(sequence, stretch), layers, file


Stored = tuple[Path, SavedHistory, list[LayerSizes], Path]


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_file_that_ends_too_early_is_refused(stored: Stored, kept: int) -> None:
    folder, history, layers, file = stored
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(StoreError, match=file.name):
        read_back(folder, history, layers, verify=False)
    file.write_bytes(data + b"x")
    with pytest.raises(StoreError, match="bytes in a file that must have"):
        read_back(folder, history, layers, verify=False)


def test_a_header_that_says_something_else_is_refused(stored: Stored) -> None:
    folder, history, layers, file = stored
    data = file.read_bytes()
    assert b'"F32"' in data
    file.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(StoreError, match="header"):
        read_back(folder, history, layers, verify=False)


def test_only_a_full_check_reads_the_numbers(stored: Stored) -> None:
    folder, history, layers, file = stored
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    read_back(folder, history, layers, verify=False)
    with pytest.raises(StoreError, match="not those that were written"):
        read_back(folder, history, layers)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "missing"])
def test_what_is_no_plain_file_is_refused_at_once(stored: Stored, kind: str) -> None:
    folder, history, layers, file = stored
    moved = folder / "elsewhere"
    file.rename(moved)
    if kind == "link":
        file.symlink_to(moved)
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    expected = FileNotFoundError if kind == "missing" else StoreError
    with pytest.raises(expected, match=file.name):
        read_back(folder, history, layers)


def test_what_is_mapped_stays_when_the_file_is_gone_and_is_never_written(stored: Stored) -> None:
    folder, history, layers, file = stored
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = read_back(folder, history, layers)
    before, digest = bits(parts[0][0].keys), hashlib.sha256(file.read_bytes()).digest()
    parts[0][0].values.zero_()
    assert hashlib.sha256(file.read_bytes()).digest() == digest
    file.unlink()
    assert bits(parts[0][0].keys) == before


def test_a_disk_without_room_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [LayerSizes(2, 4, 3, torch.float32)] * 3
    sequence = sequence_of(layers, 20, [])
    monkeypatch.setattr(shard_writing, "LARGEST_SHARD_BYTES", 1)
    real, left = os.writev, [2]

    def write(descriptor: int, data: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "writev", write)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path, sequence, 0, 20)
    assert list(tmp_path.iterdir()) == []


def test_a_flush_that_fails_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a failed write once, to whoever asks first."""
    sequence = sequence_of([LayerSizes(2, 4, 4, torch.float32)], 200, [])

    def fdatasync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(shard_writing, "CHUNK_BYTES", 256)
    monkeypatch.setattr(shard_writing, "_FLUSH_BYTES", 512)
    with pytest.raises(OSError, match="Input/output"):
        written(tmp_path, sequence, 0, 200)
    assert list(tmp_path.iterdir()) == []


def test_forms_with_the_same_sizes_are_the_same_file() -> None:
    one = ShardForm(3, (LayerSizes(2, 4, 3, torch.bfloat16),), 5)
    assert one.header == ShardForm(3, one.layers, 5).header
    assert one.header != ShardForm(4, one.layers, 5).header
    assert one.bytes == len(one.header) + 2 * 5 * (4 + 3) * 2
