"""What a shard looks like: a safetensors file of some layers' keys and values, to the last byte.

Sizes follow from the manifest, so a file is compared with what it must be, and nothing in it is
believed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sfi_agent.engine.saved_history import LayerSizes

__all__ = [
    "DTYPE_NAMES",
    "ShardForm",
    "TensorPlace",
    "dtype_named",
    "grouped",
    "name_of_dtype",
]

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in _SAFETENSORS_NAMES)
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor in a shard.

    Attributes:
        offset: Of its first byte, from the beginning of the file.
        shape: `(kv_heads, tokens, dim)`.
    """

    offset: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class ShardForm:
    """The tokens of some layers in one file.

    Attributes:
        first_layer: Index of the first one in the model.
        layers: Sizes of the layers, in order.
        tokens: How many each of them holds.
    """

    first_layer: int
    layers: tuple[LayerSizes, ...]
    tokens: int

    @cached_property
    def header(self) -> bytes:
        """What stands before the first tensor: its length is a multiple of 64 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape, dtype in self._tensors():
            end = offset + _size(shape, dtype)
            entries[name] = {
                "dtype": _SAFETENSORS_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = -(-(8 + len(text)) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @cached_property
    def bytes(self) -> int:
        """Length of the file."""
        return len(self.header) + sum(_size(shape, dtype) for _, shape, dtype in self._tensors())

    def places(self) -> list[TensorPlace]:
        """Keys and values of every layer in turn."""
        found, offset = [], len(self.header)
        for _, shape, dtype in self._tensors():
            found.append(TensorPlace(offset, shape))
            offset += _size(shape, dtype)
        return found

    def _tensors(self) -> list[tuple[str, tuple[int, int, int], torch.dtype]]:
        found = []
        for index, sizes in enumerate(self.layers, start=self.first_layer):
            for kind, dim in (("keys", sizes.key_dim), ("values", sizes.value_dim)):
                shape = (sizes.kv_heads, self.tokens, dim)
                found.append((f"layers.{index}.{kind}", shape, sizes.dtype))
        return found


def grouped(layers: Sequence[LayerSizes], tokens: int, most_bytes: int) -> list[ShardForm]:
    """All layers as shards of at most so many bytes, and at least one layer each."""
    groups: list[list[LayerSizes]] = []
    room = 0
    for sizes in layers:
        wanted = _layer_bytes(sizes, tokens)
        if not groups or wanted > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(sizes)
        room -= wanted
    forms, first = [], 0
    for group in groups:
        forms.append(ShardForm(first, tuple(group), tokens))
        first += len(group)
    return forms


def name_of_dtype(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """One of `DTYPE_NAMES` as torch knows it."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _size(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    heads, tokens, dim = shape
    return heads * tokens * dim * dtype.itemsize


def _layer_bytes(sizes: LayerSizes, tokens: int) -> int:
    return sizes.kv_heads * (sizes.key_dim + sizes.value_dim) * tokens * sizes.dtype.itemsize
