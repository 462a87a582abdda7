"""Moving the storage of idle histories out of the way and back.

A buffer is moved in place: its keys and values become other tensors with the same tokens, and every
history that reads it finds them there. Only the tokens that somebody reads are kept; the room
behind them is taken anew on the way back.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
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
    """Into a file, which is mapped and has no name from then on.

    Raises:
        StoreError: The file cannot be written; the buffer is where it was.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    path = folder / f"parked-{uuid.uuid4().hex}.safetensors"
    tensors = {
        name: _on_host(tensor, used_tokens)
        for name, tensor in (("keys", buffer.keys), ("values", buffer.values))
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        with safe_open(path, framework="pt") as file:
            keys, values = (file.get_tensor(name) for name in tensors)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            explain(
                f"parked a session in {str(folder)!r}",
                got=f"{type(error).__name__}: {error}",
                remedy="free space there, choose another directory, or raise the limits",
            )
        ) from error
    finally:
        # The map keeps the bytes; nothing is left behind, whatever happens to the process.
        path.unlink(missing_ok=True)
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


def _copy_tokens(target: Tensor, source: Tensor, tokens: int) -> None:
    # Head by head: the tokens of one head lie without gaps, so nothing is gathered on the way.
    for head in range(source.shape[0]):
        target[head, :tokens].copy_(source[head, :tokens])


def _replace(buffer: Buffer, keys: Tensor, values: Tensor) -> None:
    buffer.keys, buffer.values = keys, values
    # Computed again when a selector asks.
    buffer.key_norms, buffer.normed_tokens = None, 0
