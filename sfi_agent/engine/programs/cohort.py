"""Sequences that step together, in slots, and where their keys and values lie.

A slot's tables change when a sequence takes it, when a buffer grows or when a fork begins a tail of
its own; programs read them on the device, so they stay valid.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch
from torch import Tensor

from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.kernels import ExtentPlace, ExtentTable
from sfi_agent.engine.programs.control import FAST, IDLE
from sfi_agent.engine.sequence import SequenceState

__all__ = ["Cohort", "Geometry", "geometry_of", "places_of", "read_histories", "shared_tokens"]


@dataclass(frozen=True)
class Geometry:
    """What sequences must have in common to step together.

    Attributes:
        sparse: Per layer whether fast steps read a memory there.
        windows: Per layer its sliding window in tokens, or None.
        sink_tokens, selected_tokens, recent_tokens: Sizes of the memory; 0 in mode dense.
        kv_heads: KV heads of every layer.
        key_dim, value_dim: Head sizes.
        dtype: Of keys and values.
        extents: Most extents of a history that is on the device: 1, or the next power of two.
    """

    sparse: tuple[bool, ...]
    windows: tuple[int | None, ...]
    sink_tokens: int
    selected_tokens: int
    recent_tokens: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    extents: int

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Asked for several times per step and row.
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(index for index, sparse in enumerate(self.sparse) if sparse)


def geometry_of(sequence: SequenceState) -> Geometry | None:
    """The geometry of a sequence with a history; None where its layers differ in size."""
    buffers = [layer.history.extents[0].buffer for layer in sequence.layers]
    sizes = {(b.keys.shape[0], b.keys.shape[-1], b.values.shape[-1]) for b in buffers}
    if len(sizes) > 1:
        return None
    layout = sequence.layout
    histories = read_histories(sequence)
    extents = max((len(history.extents) for history in histories), default=1)
    return Geometry(
        tuple(layer.memory is not None for layer in sequence.layers),
        tuple(layer.window for layer in sequence.layers),
        layout.sink_tokens if layout is not None else 0,
        layout.selected_tokens if layout is not None else 0,
        layout.recent_tokens if layout is not None else 0,
        *sizes.pop(),
        buffers[0].keys.dtype,
        # One more, because a fork begins an extent of its own with its first token.
        1 << (extents - 1).bit_length() if _writes_in_place(histories) else _next_power(extents),
    )


def read_histories(sequence: SequenceState) -> list[LayerHistory]:
    """Histories that programs may read and write: those on the device. Others are never told to
    them: no table has an address in host memory."""
    histories = [layer.history for layer in sequence.layers]
    return [history for history in histories if not history.streamed]


def shared_tokens(sequences: Sequence[SequenceState]) -> int:
    """Tokens at the start of all of these histories that lie in the same buffers."""
    histories = [sequence.layers[0].history.extents for sequence in sequences]
    shared = 0
    for extents in zip(*histories, strict=False):
        if any(extent.buffer is not extents[0].buffer for extent in extents):
            break
        shared += min(extent.tokens for extent in extents)
        if any(extent.tokens != extents[0].tokens for extent in extents):
            break
    return shared


class Cohort:
    """See the module text.

    Args:
        geometry: Of its sequences.
        batch: Number of slots.
        device: Where the steps run.

    Attributes:
        history: Extents of the histories.
        memory: The one extent of each memory; nothing on dense and sliding layers.
        memory_starts: `[layers, batch, kv_heads]` int64, first visible slot of the memories.
        sparse_rows: `[layers, 1]` bool, whether fast steps read a memory there.
        whole_rows: `[layers]` bool, whether dense steps read the whole history there.
        nothing: `[extents + 1, 5]` int64, the table row of a slot that does nothing.
        on_evict: Told of a sequence that loses its slot to another, before it does.
    """

    def __init__(self, geometry: Geometry, batch: int, device: torch.device) -> None:
        layers = len(geometry.sparse)
        self.geometry = geometry
        self.batch = batch
        self.device = device
        aligned = device.type == "cuda"
        self.history = ExtentTable(layers, batch, geometry.extents, device, aligned=aligned)
        self.memory = ExtentTable(layers, batch, 1, device, aligned=aligned)
        self.memory_starts = torch.zeros(
            layers, batch, geometry.kv_heads, dtype=torch.int64, device=device
        )
        self.history.upload()
        self.memory.upload()
        self.nothing = self.history.fields[0, 0].clone()
        sparse = torch.tensor(geometry.sparse, device=device)
        self.sparse_rows = sparse[:, None]
        self.whole_rows = torch.tensor(
            [window is None for window in geometry.windows], device=device
        )
        self.on_evict: Callable[[SequenceState, int], None] = lambda sequence, slot: None
        self._sequences: list[weakref.ref[SequenceState] | None] = [None] * batch
        self._placed: list[tuple[int, ...] | None] = [None] * batch

    def take_slots(self, sequences: Sequence[SequenceState]) -> list[int]:
        """The slot of each sequence: where it is already, else a free one, else another's."""
        present = [ref() if ref is not None else None for ref in self._sequences]
        slots = [_index(present, sequence) for sequence in sequences]
        taken = {slot for slot in slots if slot is not None}
        free = [slot for slot in range(self.batch) if slot not in taken]
        free.sort(key=lambda slot: present[slot] is not None)
        for index, sequence in enumerate(sequences):
            if slots[index] is None:
                slot = free.pop(0)
                slots[index] = slot
                self._evict(present[slot], slot)
                self._sequences[slot] = weakref.ref(sequence, partial(self._vacate, slot))
                self._placed[slot] = None
        return [slot for slot in slots if slot is not None]

    def place(self, slots: Sequence[int], sequences: Sequence[SequenceState]) -> None:
        """Bring the tables up to date with where these sequences keep their tokens."""
        changed = False
        for slot, sequence in zip(slots, sequences, strict=True):
            if self._placed[slot] != _signature(sequence):
                self._place(slot, sequence)
                self._placed[slot] = _signature(sequence)
                changed = True
        if changed:
            self.history.upload()
            self.memory.upload()

    def active_fields(self, kinds: Tensor) -> Tensor:
        """Table rows `[layers, batch, extents + 1, 5]` of what each slot reads in a step.

        Args:
            kinds: `[batch]` int64, of the control.
        """
        layers, extents = len(self.geometry.sparse), self.geometry.extents
        unused = self.nothing[1:extents].expand(layers, self.batch, -1, -1)
        memory = torch.cat([self.memory.fields, unused], dim=2)
        fast = ((kinds == FAST)[None, :] & self.sparse_rows)[..., None, None]
        fields = torch.where(fast, memory, self.history.fields)
        return torch.where((kinds == IDLE)[None, :, None, None], self.nothing, fields)

    def extent_places(
        self, layer: int, kinds: Sequence[int]
    ) -> tuple[tuple[ExtentPlace, ...], ...]:
        """The same for one layer as places, for the plain references."""
        histories = self.history.layer(layer).places
        memories = self.memory.layer(layer).places if self.geometry.sparse[layer] else histories
        return tuple(
            () if kind == IDLE else memories[slot] if kind == FAST else histories[slot]
            for slot, kind in enumerate(kinds)
        )

    def _vacate(self, slot: int, gone: weakref.ref[SequenceState]) -> None:
        """A sequence has been freed: the tables let go of its buffers, which are the memory."""
        if self._sequences[slot] is gone:
            self._sequences[slot] = self._placed[slot] = None
            for layer in range(len(self.geometry.sparse)):
                # On the device the row stays as it was until the slot is taken; idle slots read
                # nothing.
                self.history.clear(layer, slot)
                self.memory.clear(layer, slot)

    def _evict(self, sequence: SequenceState | None, slot: int) -> None:
        """A sequence that may come back keeps the starts that lie in its slot."""
        if sequence is None:
            return
        self.on_evict(sequence, slot)
        for index, layer in enumerate(sequence.layers):
            memory = layer.memory
            here = self.memory_starts[index, slot].data_ptr()
            if memory is not None and memory.starts.data_ptr() == here:
                memory.starts = memory.starts.clone()

    def _place(self, slot: int, sequence: SequenceState) -> None:
        ready = sequence.layout is not None and sequence.layout.ready
        for index, layer in enumerate(sequence.layers):
            if layer.history.streamed:
                self.history.clear(index, slot)
            else:
                self.history.place(index, slot, places_of(layer.history))
            memory = layer.memory
            if memory is not None and memory.keys.ndim == 3:
                self.memory.place(index, slot, [ExtentPlace(memory.keys, memory.values)])
                # A refresh outside of programs leaves starts of its own; from now on they are here.
                if ready:
                    self.memory_starts[index, slot].copy_(memory.starts)
                memory.starts = self.memory_starts[index, slot]


def places_of(history: LayerHistory) -> list[ExtentPlace]:
    """Where the tokens of a history lie."""
    places, first = [], 0
    for extent in history.extents:
        places.append(ExtentPlace(extent.buffer.keys, extent.buffer.values, first))
        first += extent.tokens
    return places


def _signature(sequence: SequenceState) -> tuple[int, ...]:
    """Changes whenever a table of the sequence would."""
    moves = sequence.moves.count
    memory = next((layer.memory for layer in sequence.layers if layer.memory is not None), None)
    if memory is None:
        return (moves,)
    return moves, memory.keys.data_ptr(), memory.keys.numel(), memory.starts.data_ptr()


def _writes_in_place(histories: Sequence[LayerHistory]) -> bool:
    last = [history.extents[-1] for history in histories]
    return all(end.owned and end.tokens >= end.buffer.shared_tokens for end in last)


def _next_power(extents: int) -> int:
    return 1 << extents.bit_length()


def _index(present: Sequence[SequenceState | None], sequence: SequenceState) -> int | None:
    return next((slot for slot, there in enumerate(present) if there is sequence), None)
