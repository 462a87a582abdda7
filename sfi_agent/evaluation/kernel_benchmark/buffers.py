"""The tensors that the arms of one workload work on, filled at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.kernels import (
    EvidenceBuffers,
    ExtentPlace,
    ExtentTable,
    SelectionScratch,
)
from sfi_agent.evaluation.kernel_benchmark.workload import KernelShape, Workload

__all__ = ["Buffers", "Pool", "Step"]

_STEP_TOKENS = 16
_LOGIT_NATS = 3.0
_COUNTERS = 1 << 20
"""More than any launch needs: a row block of 16 query rows each, 4 MB."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Keys and values of several layers, and the table that says where they lie.

    Attributes:
        table: All layers; layer i lies in buffer i modulo the number of buffers.
        keys: `[buffers, batch, kv_heads, capacity, head_size]`.
        values: Likewise.
        ends: `[batch]` int64, the tokens of each sequence.
        tokens: The most of them.
    """

    table: ExtentTable
    keys: Tensor
    values: Tensor
    ends: Tensor
    tokens: int

    @property
    def buffers(self) -> int:
        return self.keys.shape[0]


@dataclass(frozen=True, slots=True)
class Step:
    """Queries, keys and values of the new tokens of a step.

    Attributes:
        query: `[batch, queries, query_heads, head_size]`.
        keys: `[batch, queries, kv_heads, head_size]`.
        values: Likewise.
    """

    query: Tensor
    keys: Tensor
    values: Tensor


class Buffers:
    """Everything a workload needs; allocated when it is made.

    Args:
        workload: Sizes.
        device: Where the arms run.
        lengths: Tokens of each history; None for the workload's context for all.
        ranked_lengths: Tokens of the history that evidence is ranked of; None for the same.

    Attributes:
        history: Pool of the histories.
        memory: Pool of the memories.
        logits: Evidence by number type, `[buffers, batch, kv_heads, group, capacity]`.
        rest_mass: `[batch, kv_heads, group]` float32.
        lse: `[batch, kv_heads, group]` float32, of the evidence that is ranked.
        ranked_tokens: `[batch]` int64, tokens of the histories that evidence is ranked of.
        scratch: Of all layers.
        positions: `[layers, batch, kv_heads, selected]` int64, ascending, drawn at random.
        counts: `[layers, batch, kv_heads]` int64.
        gathered_starts: `[layers, batch, kv_heads]` int64.
        starts: `[batch, kv_heads]` int64, all 0.
        counters: int32, zero.
    """

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        lengths: tuple[int, ...] | None = None,
        ranked_lengths: tuple[int, ...] | None = None,
    ) -> None:
        shape, batch, heads = workload.shape, workload.batch, workload.shape.kv_heads
        self.workload, self.device = workload, device
        self.generator = torch.Generator(device).manual_seed(1)
        lengths = lengths or (workload.context_tokens,) * batch
        self.history = self._pool(lengths)
        self.memory = self._pool((shape.memory_tokens,) * batch)
        ranked_lengths = ranked_lengths or lengths
        self.ranked_tokens = torch.tensor(ranked_lengths, device=device)
        # Evidence of the history of a step lies in the same buffers.
        capacity = max(*ranked_lengths, *lengths) + workload.room_tokens
        self.scratch = SelectionScratch((shape.layers, batch, heads), capacity, device)
        self.logits = {dtype: self._evidence(dtype) for dtype in (torch.float32, torch.float16)}
        self.fill_evidence()
        rows = (batch, heads, shape.group)
        self.rest_mass = torch.zeros(rows, device=device)
        self.lse = 16.0 + torch.rand(rows, device=device, generator=self.generator)
        self.positions = self._positions(min(lengths))
        self.counts = torch.full(self.positions.shape[:-1], shape.selected_tokens, device=device)
        self.gathered_starts = torch.zeros_like(self.counts)
        self.starts = torch.zeros(batch, heads, dtype=torch.int64, device=device)
        self.counters = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)

    def step(self, queries: int) -> Step:
        """The new tokens of a step, drawn at random."""
        shape, batch = self.workload.shape, self.workload.batch
        sizes = [(batch, queries, n, shape.head_size) for n in (shape.query_heads, shape.kv_heads)]
        query, keys, values = (self._draw(*size) for size in (sizes[0], sizes[1], sizes[1]))
        return Step(query, keys, values)

    def fill_evidence(self) -> None:
        """Draw evidence at random, everywhere."""
        for logits in self.logits.values():
            logits.normal_(std=_LOGIT_NATS, generator=self.generator)

    def evidence(self, layer: int) -> EvidenceBuffers:
        """Where a step of this layer writes the evidence of its newest query."""
        logits, shape = self.logits[torch.float32], self.workload.shape
        return EvidenceBuffers(
            logits[layer % len(logits)], self.rest_mass, shape.sink_tokens, shape.recent_tokens
        )

    def _draw(self, *size: int) -> Tensor:
        empty = torch.empty(size, device=self.device, dtype=self.workload.shape.dtype)
        return empty.normal_(generator=self.generator)

    def _pool(self, lengths: tuple[int, ...]) -> Pool:
        workload, shape = self.workload, self.workload.shape
        tokens = max(lengths)
        buffers = workload.layers_apart(workload.extent_bytes(tokens))
        capacity = -(-(tokens + workload.room_tokens) // _STEP_TOKENS) * _STEP_TOKENS
        size = (buffers, workload.batch, shape.kv_heads, capacity, shape.head_size)
        keys, values = self._draw(*size), self._draw(*size)
        table = ExtentTable(shape.layers, workload.batch, 1, self.device)
        for layer in range(shape.layers):
            for sequence in range(workload.batch):
                place = (layer % buffers, sequence)
                table.place(layer, sequence, [ExtentPlace(keys[place], values[place])])
        table.upload()
        ends = torch.tensor(lengths, device=self.device)
        return Pool(table, keys, values, ends, tokens)

    def _evidence(self, dtype: torch.dtype) -> Tensor:
        workload, shape = self.workload, self.workload.shape
        buffers = workload.layers_apart(workload.evidence_bytes(dtype.itemsize))
        size = (buffers, workload.batch, shape.kv_heads, shape.group, self.scratch.keys.shape[-1])
        return torch.empty(size, device=self.device, dtype=dtype)

    def _positions(self, tokens: int) -> Tensor:
        """One position out of each of as many equal stretches of the candidates: ascending."""
        shape: KernelShape = self.workload.shape
        budget = shape.selected_tokens
        width = (tokens - shape.sink_tokens - shape.recent_tokens) // budget
        size = (shape.layers, self.workload.batch, shape.kv_heads, budget)
        drawn = torch.randint(width, size, device=self.device, generator=self.generator)
        return drawn.add_(torch.arange(budget, device=self.device) * width + shape.sink_tokens)
