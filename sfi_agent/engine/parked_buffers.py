"""Moving the storage of idle histories out of the way and back.

A buffer is moved in place: its keys and values become other tensors with the same tokens, and every
history that reads it finds them there. Only the tokens that somebody reads are kept; the room
behind them is taken anew on the way back.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sfi_agent.engine.history import Buffer, LayerHistory
from sfi_agent.engine.saved_history import SavedBuffer
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.errors import StoreError, explain

__all__ = ["Parked", "Place", "buffers_of", "move_back", "move_to_disk", "move_to_host"]

Place = Literal["host", "disk"]


@dataclass(frozen=True, slots=True)
class Parked:
    """A buffer that is out of the way.

    Attributes:
        place: "host" is host memory, "disk" a file without a name, which nobody else can open and
            which ends with the process at the latest.
        capacity: Tokens that it had room for.
    """

    place: Place
    capacity: int


def buffers_of(sequences: Iterable[SequenceState]) -> dict[Buffer, int]:
    """Every buffer that these sequences read or write, and how many of its tokens they see.

    Buffers over mapped files are left out: they are on disk already and hold no memory.
    """
    found: dict[Buffer, int] = {}
    for sequence in sequences:
        for layer in sequence.layers:
            for buffer, tokens in _seen(layer.history):
                found[buffer] = max(found.get(buffer, 0), tokens)
    return found


def move_to_host(buffer: Buffer, used_tokens: int) -> None:
    """From a device into host memory."""
    keys, values = (_on_host(tensor, used_tokens) for tensor in (buffer.keys, buffer.values))
    _replace(buffer, keys, values)


def move_to_disk(buffer: Buffer, used_tokens: int, folder: Path) -> None:
    """Into a file without a name, which is mapped.

    Raises:
        StoreError: The file cannot be written; the buffer is where it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # It has no name from the beginning: nothing is left behind, whatever ends the process.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for tensor in (buffer.keys, buffer.values):
                _write_tokens(file, tensor, used_tokens)
            keys, values = _mapped(file.fileno(), (buffer.keys, buffer.values), used_tokens)
    except OSError as error:
        raise StoreError(
            explain(
                f"parked a session in {str(folder)!r}",
                got=f"{type(error).__name__}: {error}",
                remedy="free space there, choose another directory, or raise the limits",
            )
        ) from error
    _replace(buffer, keys, values)


def move_back(buffer: Buffer, parked: Parked, device: torch.device) -> None:
    """To where steps read it, with the room that it had."""
    keys, values = buffer.keys, buffer.values
    if buffer.home is not None:
        roomy = [buffer.home.empty(tensor, parked.capacity) for tensor in (keys, values)]
    else:
        roomy = [
            tensor.new_empty(tensor.shape[0], parked.capacity, tensor.shape[2], device=device)
            for tensor in (keys, values)
        ]
    for target, source in zip(roomy, (keys, values), strict=True):
        _copy_tokens(target, source, source.shape[1])
    _replace(buffer, *roomy)


def _seen(history: LayerHistory) -> list[tuple[Buffer, int]]:
    extents = [(extent.buffer, extent.tokens) for extent in history.extents]
    spare = [(buffer, 0) for buffer in history.owned_buffers]
    return [pair for pair in (*extents, *spare) if not isinstance(pair[0], SavedBuffer)]


def _on_host(tensor: Tensor, used_tokens: int) -> Tensor:
    heads, _, dim = tensor.shape
    target = torch.empty(heads, used_tokens, dim, dtype=tensor.dtype)
    _copy_tokens(target, tensor, used_tokens)
    return target


def _write_tokens(file: RawIOBase, tensor: Tensor, used_tokens: int) -> None:
    for head in tensor:
        left = memoryview(head[:used_tokens].cpu().view(torch.uint8).flatten().numpy())
        while left:
            left = left[file.write(left) :]


def _mapped(descriptor: int, tensors: Sequence[Tensor], used_tokens: int) -> list[Tensor]:
    """What lies in a file, one tensor behind the other; only read when somebody looks."""
    shapes = [(tensor.shape[0], used_tokens, tensor.shape[2]) for tensor in tensors]
    if not used_tokens:
        return [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
    # The map outlives the descriptor.
    mapped = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    found, offset = [], 0
    for tensor, shape in zip(tensors, shapes, strict=True):
        count = math.prod(shape)
        flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=count, offset=offset)
        found.append(flat.view(shape))
        offset += flat.nbytes
    return found


def _copy_tokens(target: Tensor, source: Tensor, tokens: int) -> None:
    # Head by head: the tokens of one head lie without gaps, so nothing is gathered on the way.
    for head in range(source.shape[0]):
        target[head, :tokens].copy_(source[head, :tokens])


def _replace(buffer: Buffer, keys: Tensor, values: Tensor) -> None:
    buffer.keys, buffer.values = keys, values
    # Computed again when a selector asks.
    buffer.key_norms, buffer.normed_tokens = None, 0
