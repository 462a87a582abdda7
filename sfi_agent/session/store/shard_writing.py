"""Keys and values into files, at the speed of the disk.

What a file holds is copied together chunk by chunk, on the host or from the device. While the next
chunk is made, threads compute digests and write the ones before it, and the system is already told
to bring what was written to the disk. A few chunks are all the memory this takes.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.saved_history import history_parts, layer_sizes
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.session.store.digests import as_bytes, digest_of, host_bytes
from sfi_agent.session.store.directory import StoreDirectory, write_all
from sfi_agent.session.store.manifest import SavedShard, SavedStretch
from sfi_agent.session.store.shard_form import ShardForm, grouped

__all__ = ["CHUNK_BYTES", "LARGEST_SHARD_BYTES", "write_stretch"]

CHUNK_BYTES = 1 << 22
"""Files are digested in pieces of this size, so that several can be digested at once."""

LARGEST_SHARD_BYTES = 1 << 29
"""Unless one layer is larger. It bounds what a save that merges small files holds twice on disk."""

_LEAST_DIRECT_BYTES = 1 << 16
"""Smaller pieces are copied together, so that few of them make a chunk."""

_CHUNKS_UNDER_WAY = 6
_DIGEST_THREADS = 2
_FLUSH_BYTES = 1 << 26


def write_stretch(
    directory: StoreDirectory, sequence: SequenceState, start: int, end: int
) -> SavedStretch:
    """Write the tokens from `start` up to `end` of all layers; they are on the disk afterwards.

    Raises:
        OSError: There is no room, or the disk fails; the files are gone then.
    """
    layers = [layer_sizes(layer.history) for layer in sequence.layers]
    forms = grouped(layers, end - start, LARGEST_SHARD_BYTES)
    with ExitStack() as held, _Threads() as threads:
        shards = []
        for form in forms:
            name, descriptor = held.enter_context(directory.new_shard())
            pipe = _Pipe(descriptor, threads)
            pipe.put(torch.frombuffer(bytearray(form.header), dtype=torch.uint8))
            for source in _sources(sequence, form, start, end):
                pipe.put(source)
            digest = pipe.finish()
            threads.bring_to_disk(os.fsync, descriptor)
            shards.append(
                SavedShard(
                    name=name,
                    first_layer=form.first_layer,
                    layers=len(form.layers),
                    bytes=form.bytes,
                    digest=digest,
                )
            )
        threads.settle()
    return SavedStretch(tokens=end - start, held_tokens=end - start, shards=tuple(shards))


def _sources(sequence: SequenceState, form: ShardForm, start: int, end: int) -> Iterator[Tensor]:
    """The bytes of a shard's tensors in order, each as `[bytes]` uint8 where it lies."""
    for index in range(form.first_layer, form.first_layer + len(form.layers)):
        parts = list(history_parts(sequence.layers[index].history, start, end))
        for tensors in ([part.keys for part in parts], [part.values for part in parts]):
            for head in range(tensors[0].shape[0]):
                for tensor in tensors:
                    yield as_bytes(tensor[head])


class _Threads:
    """Who works beside the thread that copies."""

    def __init__(self) -> None:
        self.digest = ThreadPoolExecutor(_DIGEST_THREADS, "sfi-digest")
        self.write = ThreadPoolExecutor(1, "sfi-write")
        self._sync = ThreadPoolExecutor(1, "sfi-sync")
        self._synced: list[Future[None]] = []

    def bring_to_disk(self, how: Callable[[int], None], descriptor: int) -> None:
        """Call `os.fsync` or `os.fdatasync` once all writes asked for so far are done."""
        self.write.submit(lambda: self._synced.append(self._sync.submit(how, descriptor)))

    def settle(self) -> None:
        """Everything that was asked for is done.

        Raises:
            OSError: Some of it has failed. The system says so once, whoever asks first.
        """
        self.write.shutdown()
        for synced in self._synced:
            synced.result()

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.digest, self.write, self._sync):
            pool.shutdown()


@dataclass(slots=True)
class _Chunk:
    """Bytes on their way; `room` is used again when both futures are done."""

    room: Tensor | None
    digest: Future[bytes]
    written: Future[None]


class _Pipe:
    """One file that is being written.

    Args:
        descriptor: Of the file, empty.
        threads: Shared by all files of a save.
    """

    def __init__(self, descriptor: int, threads: _Threads) -> None:
        self._descriptor = descriptor
        self._threads = threads
        self._under_way: deque[_Chunk] = deque()
        self._pieces: list[Tensor] = []
        self._filled = 0
        self._room: Tensor | None = None
        self._room_filled = 0
        self._spare: list[Tensor] = []
        self._unflushed = 0
        self._digests = hashlib.sha256()

    def put(self, source: Tensor) -> None:
        """Append `[bytes]` uint8, on any device; what it holds does not change until `finish`."""
        done = 0
        while done < source.numel():
            count = min(source.numel() - done, CHUNK_BYTES - self._filled)
            part = source[done : done + count]
            if part.device.type == "cpu" and count >= _LEAST_DIRECT_BYTES:
                self._pieces.append(part)
            else:
                self._copy(part)
            done += count
            self._filled += count
            if self._filled == CHUNK_BYTES:
                self._send()

    def finish(self) -> str:
        """Everything is with the system; the digest of the file."""
        if self._filled:
            self._send()
        while self._under_way:
            self._settle()
        return self._digests.hexdigest()

    def _copy(self, part: Tensor) -> None:
        """Small ones behind each other, as one piece; those of a device to the host."""
        if self._room is None:
            self._room = self._spare.pop() if self._spare else _empty_chunk()
            self._room_filled = 0
        start, end = self._room_filled, self._room_filled + part.numel()
        self._room[start:end].copy_(part)
        last = self._pieces[-1] if self._pieces else None
        room_end = self._room.data_ptr() + start
        if last is not None and start and last.data_ptr() + last.numel() == room_end:
            self._pieces[-1] = self._room[start - last.numel() : end]
        else:
            self._pieces.append(self._room[start:end])
        self._room_filled = end

    def _settle(self) -> None:
        """Wait for the oldest chunk; its room is free again."""
        chunk = self._under_way.popleft()
        chunk.written.result()
        self._digests.update(chunk.digest.result())
        if chunk.room is not None:
            self._spare.append(chunk.room)

    def _send(self) -> None:
        pieces, threads = tuple(self._pieces), self._threads
        digest = threads.digest.submit(digest_of, *pieces)
        data = [host_bytes(piece) for piece in pieces]
        written = threads.write.submit(write_all, self._descriptor, *data)
        self._under_way.append(_Chunk(self._room, digest, written))
        self._unflushed += self._filled
        self._pieces, self._filled, self._room = [], 0, None
        if self._unflushed >= _FLUSH_BYTES:
            threads.bring_to_disk(os.fdatasync, self._descriptor)
            self._unflushed = 0
        if len(self._under_way) >= _CHUNKS_UNDER_WAY:
            self._settle()


def _empty_chunk() -> Tensor:
    return torch.empty(CHUNK_BYTES, dtype=torch.uint8)
