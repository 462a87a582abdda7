"""Files of keys and values: opened with suspicion, verified, and mapped into memory.

A file must have the length and the header that follow from the manifest, byte by byte, so nothing
in it needs to be understood. Verifying reads it through a small buffer; mapping reads nothing.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from sfi_agent.engine.saved_history import LayerSizes, SavedPart
from sfi_agent.session.store.digests import digest_of, host_bytes
from sfi_agent.session.store.directory import StoreDirectory
from sfi_agent.session.store.manifest import SavedHistory, SavedShard
from sfi_agent.session.store.manifest_file import damaged
from sfi_agent.session.store.shard_form import ShardForm, TensorPlace
from sfi_agent.session.store.shard_writing import CHUNK_BYTES

__all__ = ["OpenShard", "map_layers", "open_shards", "verify_shards"]

_MOST_THREADS = 4
_AHEAD_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard whose length and header are right.

    Attributes:
        path: For messages.
        descriptor: Of the open file.
        saved: What the manifest says of it.
        form: What it looks like.
        tokens: How many of its tokens are used.
    """

    path: Path
    descriptor: int
    saved: SavedShard
    form: ShardForm
    tokens: int

    def verify(self, pool: ThreadPoolExecutor, rooms: SimpleQueue[Tensor]) -> None:
        """Compare every byte with the digest.

        Args:
            pool: Reads and computes.
            rooms: Of one chunk each, as many as the pool has threads.

        Raises:
            StoreError: The file is not what was written.
        """
        offsets = range(0, self.form.bytes, CHUNK_BYTES)
        found = hashlib.sha256()
        for digest in pool.map(partial(self._chunk_digest, rooms), offsets):
            found.update(digest)
        if found.hexdigest() != self.saved.digest:
            raise damaged(self.path, "bytes that are not those that were written")

    def map(self) -> list[SavedPart]:
        """The used tokens of each layer. What is mapped stays, also when the file is removed."""
        try:
            file = mmap.mmap(self.descriptor, self.form.bytes, access=mmap.ACCESS_COPY)
        except ValueError as error:  # It has become shorter since.
            raise damaged(self.path, str(error)) from error
        mapped, parts = memoryview(file), []
        places = self.form.places()
        for sizes, *both in zip(self.form.layers, places[::2], places[1::2], strict=True):
            spans: list[tuple[int, int]] = []
            for place in both:
                spans += self._used_bytes(place, sizes.dtype.itemsize)
            keys, values = (self._used(mapped, place, sizes.dtype) for place in both)
            parts.append(SavedPart(keys, values, _ReadAhead(file, spans)))
        return parts

    def _used(self, mapped: memoryview, place: TensorPlace, dtype: torch.dtype) -> Tensor:
        count = math.prod(place.shape)
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=place.offset)
        return flat.view(place.shape)[:, : self.tokens]

    def _used_bytes(self, place: TensorPlace, itemsize: int) -> Iterator[tuple[int, int]]:
        """Of each head: its first byte, and the one behind its last."""
        heads, tokens, dim = place.shape
        for head in range(heads):
            start = place.offset + head * tokens * dim * itemsize
            yield start, start + self.tokens * dim * itemsize

    def _chunk_digest(self, rooms: SimpleQueue[Tensor], offset: int) -> bytes:
        room = rooms.get()
        try:
            data = room[: self.form.bytes - offset]
            if _read(self.descriptor, host_bytes(data), offset) < data.numel():
                raise damaged(self.path, "a file that ends too early")
            return digest_of(data)
        finally:
            rooms.put(room)


class _ReadAhead:
    """Asks the system once for parts of a mapped file.

    Without it every page is waited for as it is touched, a few of its neighbours beside it.

    Args:
        file: Mapped as a whole.
        spans: First byte of each part, and the one behind its last.
    """

    def __init__(self, file: mmap.mmap, spans: Sequence[tuple[int, int]]) -> None:
        self._file = file
        self._spans = tuple(spans)

    def __call__(self) -> None:
        spans, self._spans = self._spans, ()
        for start, end in spans if hasattr(mmap, "MADV_WILLNEED") else ():
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            for offset in range(first, end, _AHEAD_BYTES):
                # The system takes less than it is asked for, so it is asked in small portions.
                self._file.madvise(mmap.MADV_WILLNEED, offset, min(_AHEAD_BYTES, end - offset))


@contextmanager
def open_shards(
    directory: StoreDirectory, history: SavedHistory, layers: Sequence[LayerSizes]
) -> Iterator[list[list[OpenShard]]]:
    """Open all files of a history, stretch by stretch, for the length of a with block.

    Args:
        directory: Where they are.
        history: What the manifest says.
        layers: The sizes that the model gives to its layers.

    Raises:
        FileNotFoundError: One is missing.
        StoreError: One is no plain file, or has another length or header than it must have.
    """
    with ExitStack() as held:
        found = []
        for stretch in history.stretches:
            shards = []
            for saved in stretch.shards:
                last = saved.first_layer + saved.layers
                own = tuple(layers[saved.first_layer : last])
                form = ShardForm(saved.first_layer, own, stretch.held_tokens)
                path = directory.path / saved.name
                descriptor, size = held.enter_context(directory.reading(saved.name))
                if not size == saved.bytes == form.bytes:
                    raise damaged(path, f"{size} bytes in a file that must have {form.bytes}")
                header = bytearray(len(form.header))
                _read(descriptor, memoryview(header), 0)
                if header != form.header:
                    raise damaged(path, "a header that does not say what is in the file")
                shards.append(OpenShard(path, descriptor, saved, form, stretch.tokens))
            found.append(shards)
        yield found


def verify_shards(stretches: Sequence[Sequence[OpenShard]]) -> None:
    """Compare all files with their digests, in a few threads.

    Raises:
        StoreError: One is not what was written.
        OSError: One cannot be read.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    rooms: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(threads):
        rooms.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8))
    with ThreadPoolExecutor(threads, "sfi-verify") as pool:
        for shard in (shard for shards in stretches for shard in shards):
            shard.verify(pool, rooms)


def map_layers(stretches: Sequence[Sequence[OpenShard]], layers: int) -> list[list[SavedPart]]:
    """Per layer its tokens, stretch by stretch, as mapped tensors."""
    found: list[list[SavedPart]] = [[] for _ in range(layers)]
    for shards in stretches:
        parts = [part for shard in shards for part in shard.map()]
        for own, part in zip(found, parts, strict=True):
            own.append(part)
    return found


def _read(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill a buffer from a place in a file; how much there was."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if not count:
            break
        done += count
    return done
