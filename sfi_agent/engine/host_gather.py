"""Filling memories from histories in host memory.

A device reads pinned host memory itself: one launch copies the chosen tokens of all layers over the
bus, and nobody waits on the host. Where there are no kernels or the memory could not be pinned, the
host gathers them, which takes several times as long; the reason is logged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sfi_agent.engine.history import LayerHistory
from sfi_agent.engine.host_history import next_power
from sfi_agent.engine.kernels import ExtentPlace, ExtentTable, gather, uses_kernels
from sfi_agent.engine.memory import LayerMemory, MemoryLayout, RefreshPlan
from sfi_agent.engine.programs.cohort import places_of
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.observe.log import log_event
from sfi_agent.protocols import Selection

__all__ = ["HostGather"]


_Signature: TypeAlias = tuple[int, int, int]
"""Changes whenever a table of the sequence would."""


@dataclass(frozen=True, slots=True)
class _Tables:
    """Where a sequence's tokens lie, for the device.

    Attributes:
        history: Extents of the layers with a memory, in host memory or not.
        memory: Of the same layers.
        active: `[layers, 1]` bool, which layers these are.
    """

    history: ExtentTable
    memory: ExtentTable
    active: Tensor


class HostGather:
    """See the module text.

    Args:
        device: Of the model.
        by_device: Whether the device may read host memory.
    """

    def __init__(self, device: torch.device, *, by_device: bool = True) -> None:
        self._device = device
        self._by_device = by_device
        self._known: WeakKeyDictionary[SequenceState, tuple[_Signature, _Tables | str]]
        self._known = WeakKeyDictionary()
        self._said: set[str] = set()

    def fill(
        self, sequence: SequenceState, plan: RefreshPlan, selections: list[Selection | None]
    ) -> None:
        """Copy selected, sink and recent tokens of every layer with a memory.

        Args:
            sequence: Its memories are allocated for this plan.
            plan: Of the refresh.
            selections: Per layer, checked; None where nothing is selected.
        """
        layout = sequence.layout
        heads = [layer.history.kv_heads for layer in sequence.layers if layer.memory is not None]
        if not heads or layout is None:
            return
        positions, counts = _stacked(selections, max(heads), self._device)
        starts = layout.selected_capacity - counts
        tables = self._tables_of(sequence)
        if isinstance(tables, _Tables):
            _wait_for_writes(sequence)
            tokens = torch.full_like(counts[0, 0, :1], plan.history_tokens)
            gather(
                tables.history, tables.memory, positions, counts, tokens, starts, tables.active,
                selected_capacity=layout.selected_capacity, sink_tokens=layout.sink_tokens,
                recent_tokens=layout.recent_tokens,
            )  # fmt: skip
        else:
            self._say(tables)
            _by_host(sequence, layout, plan, positions, counts)
        for index, layer in enumerate(sequence.layers):
            if layer.memory is not None:
                _set_starts(layer.memory, starts[index, 0, : layer.history.kv_heads])

    def _tables_of(self, sequence: SequenceState) -> _Tables | str:
        """Tables that are up to date, or why the device does not read this history."""
        memory = next(layer.memory for layer in sequence.layers if layer.memory is not None)
        signature = sequence.moves.count, memory.keys.data_ptr(), memory.keys.numel()
        known = self._known.get(sequence)
        if known is None or known[0] != signature:
            known = signature, self._problem(sequence) or self._made(sequence)
            self._known[sequence] = known
        return known[1]

    def _problem(self, sequence: SequenceState) -> str | None:
        """Why the device cannot read the history of a sequence; None if it can."""
        if not self._by_device:
            return "by choice"
        histories = [layer.history for layer in sequence.layers if layer.memory is not None]
        buffers = [extent.buffer for history in histories for extent in history.extents]
        sizes = {
            (b.keys.shape[0], b.keys.shape[2], b.values.shape[2], b.keys.dtype) for b in buffers
        }
        if len(sizes) > 1:
            return "layers of different head sizes"
        if self._device.type == "cpu":
            return None
        _, key_dim, value_dim, dtype = sizes.pop()
        if not uses_kernels(self._device, dtype, key_dim, value_dim):
            return "no kernels"
        there = [b for b in buffers if b.home is not None]
        if not all(b.keys.is_pinned() and b.values.is_pinned() for b in there):
            return "memory that is not pinned"
        return None

    def _made(self, sequence: SequenceState) -> _Tables:
        layers, aligned = sequence.layers, self._device.type == "cuda"
        with_memory = [layer.memory is not None for layer in layers]
        most = max(len(layer.history.extents) for layer in layers if layer.memory is not None)
        # One kernel is compiled per number of extents.
        extents = next_power(most)
        history = ExtentTable(len(layers), 1, extents, self._device, aligned=aligned)
        memory = ExtentTable(len(layers), 1, 1, self._device, aligned=aligned)
        for index, layer in enumerate(layers):
            if layer.memory is not None:
                history.place(index, 0, places_of(layer.history))
                memory.place(index, 0, [ExtentPlace(layer.memory.keys, layer.memory.values)])
        history.upload()
        memory.upload()
        active = torch.tensor(with_memory, device=self._device)[:, None]
        return _Tables(history, memory, active)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            log_event("info", "history_gathered_on_host", reason=reason)


def _wait_for_writes(sequence: SequenceState) -> None:
    """What is started from now on finds everything that was appended."""
    extents = [extent for layer in sequence.layers for extent in layer.history.extents]
    for home in {extent.buffer.home for extent in extents}:
        if home is not None and home.written is not None:
            home.written.hold()


def _stacked(
    selections: list[Selection | None], kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions `[layers, 1, kv_heads, places]` and counts `[layers, 1, kv_heads]`."""
    widths = [found.positions.shape[-1] for found in selections if found is not None]
    shape = (len(selections), 1, kv_heads)
    positions = torch.zeros((*shape, max(widths, default=0) or 1), dtype=torch.int64, device=device)
    counts = torch.zeros(shape, dtype=torch.int64, device=device)
    for index, found in enumerate(selections):
        if found is not None:
            _, heads, places = found.positions.shape
            positions[index, 0, :heads, :places] = found.positions[0]
            counts[index, 0, :heads] = found.counts[0]
    return positions, counts


def _set_starts(memory: LayerMemory, starts: Tensor) -> None:
    """Where they are, if they are somewhere: tables that know the place stay valid."""
    if memory.starts.shape == starts.shape and memory.starts.device == starts.device:
        memory.starts.copy_(starts)
    else:
        memory.starts = starts


def _by_host(
    sequence: SequenceState,
    layout: MemoryLayout,
    plan: RefreshPlan,
    positions: Tensor,
    counts: Tensor,
) -> None:
    """Gather in host memory, layer by layer, and copy what was gathered."""
    everywhere = torch.arange(max(layout.selected_capacity, plan.history_tokens), device="cpu")
    slots = everywhere[: layout.selected_capacity]
    kept = torch.cat(
        [everywhere[: plan.sink_tokens], everywhere[plan.recent_start : plan.history_tokens]]
    )
    everything, numbers = positions[:, 0].cpu(), counts[:, 0].cpu()
    for layer, chosen, count in zip(sequence.layers, everything, numbers, strict=True):
        memory = layer.memory
        if memory is None:
            continue
        heads = layer.history.kv_heads
        column = slots - (layout.selected_capacity - count[:heads, None])
        selected = chosen[:heads].gather(1, column.clamp(0, chosen.shape[-1] - 1))
        wanted = torch.cat([selected, kept.expand(heads, -1)], dim=1)
        for index, target in enumerate((memory.keys, memory.values)):
            for head, rows in enumerate(_rows(layer.history, wanted, index)):
                target[head, : wanted.shape[1]].copy_(rows)


def _rows(history: LayerHistory, wanted: Tensor, index: int) -> Tensor:
    """Keys (0) or values (1) of positions `[kv_heads, places]`: `[kv_heads, places, dim]`."""
    found: Tensor | None = None
    for piece in history.pieces():
        source = (piece.keys, piece.values)[index]
        if found is None:
            found = source.new_empty((*wanted.shape, source.shape[2]), device="cpu")
        local = wanted - piece.start
        for head in range(len(source)):
            here = (local[head] >= 0) & (local[head] < source.shape[1])
            places = here.nonzero()[:, 0]
            rows = source[head].index_select(0, local[head, places].to(source.device))
            found[head].index_copy_(0, places, rows.cpu())
    assert found is not None
    return found
