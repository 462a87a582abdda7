"""What is benchmarked, how many bytes that has to move, and how many it needs on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfi_agent.engine.kernels.linear_plans import MOST_ROWS
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.kernel_benchmark.linear_sizes import LinearLayer, LinearSizes

__all__ = ["KernelShape", "Workload"]

_CACHES_FULL = 8
"""Layers are kept apart until they fill the device's cache this many times: reads are cold."""

_POSITION_BYTES = 8
_KEY_BYTES = 4
_ROOM_STEP = 16
_SCRATCH_STEP = 1024
_MOST_PEAKS = 16384
_LARGEST_OFFSET = 2**31
_MOST_RANKED_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class KernelShape:
    """The attention of a model, the memory of its fast steps, and its linear layers.

    Attributes:
        query_heads: Query heads of a layer, a multiple of `kv_heads`.
        kv_heads: KV heads of a layer.
        head_size: Of keys and values, elements.
        layers: Layers of the model.
        dtype: Of queries, keys and values.
        memory_tokens: What a fast step attends to besides its own token.
        sink_tokens: First tokens that are always in memory.
        recent_tokens: Last tokens that are always in memory.
        block_queries: Queries of the measured blocks, as rectify and verify run them.
        linear: Of the linear layers, without biases; None leaves them out.
    """

    query_heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    layers: int = 36
    dtype: torch.dtype = torch.bfloat16
    memory_tokens: int = 2308
    sink_tokens: int = 4
    recent_tokens: int = 256
    block_queries: tuple[int, ...] = (16, 32)
    linear: LinearSizes | None = None

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def selected_tokens(self) -> int:
        return self.memory_tokens - self.sink_tokens - self.recent_tokens

    @property
    def token_bytes(self) -> int:
        """Key and value of one token in one layer, all KV heads."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def check(self, contexts: tuple[int, ...], batches: tuple[int, ...]) -> None:
        """Refuse what has no meaning, before anything is built.

        Raises:
            InputError: Naming the number and what is allowed.
        """
        for name, number in self._counts(batches).items():
            if number < 1:
                raise _refusal(f"{name}: {number}", "whole numbers above 0")
        for name, numbers in {
            "contexts": contexts,
            "batches": batches,
            "blocks of queries": self.block_queries,
        }.items():
            if len(set(numbers)) < len(numbers):
                raise _refusal(f"{name} {list(numbers)}", "each number once")
        if self.query_heads % self.kv_heads:
            got = f"{self.query_heads} heads with {self.kv_heads} KV heads"
            raise _refusal(got, "heads that are a multiple of the KV heads")
        if self.head_size % 8 or self.head_size > 256:
            raise _refusal(f"head size {self.head_size}", "multiples of 8 up to 256")
        least = self.sink_tokens + self.recent_tokens
        if self.selected_tokens < 1:
            got = f"a memory of {self.memory_tokens} tokens"
            raise _refusal(got, f"more than sink + recent = {least}")
        room = max((1, *self.block_queries)) + _ROOM_STEP
        most = min(_LARGEST_OFFSET // self.head_size, _MOST_RANKED_TOKENS) - room
        for context in contexts:
            if not self.memory_tokens < context <= most:
                got = f"a context of {context} tokens"
                allowed = f"more than the memory of {self.memory_tokens}, at most {most:,}"
                raise _refusal(got, allowed)

    def _counts(self, batches: tuple[int, ...]) -> dict[str, int]:
        """Everything that must be above 0, by name."""
        counts = {
            "heads": self.query_heads,
            "KV heads": self.kv_heads,
            "head size": self.head_size,
            "layers": self.layers,
            **{f"batch {batch}": batch for batch in batches},
            **{f"block of {queries} queries": queries for queries in self.block_queries},
        }
        if self.linear is not None:
            counts["hidden size"] = self.linear.hidden_size
            counts["intermediate size"] = self.linear.intermediate_size
            counts["vocabulary"] = self.linear.vocabulary_tokens
        return counts


def _refusal(got: str, allowed: str) -> InputError:
    return InputError(explain("benchmarked the step kernels", got=got, allowed=allowed))


@dataclass(frozen=True, slots=True)
class Workload:
    """One context length and batch of a shape.

    Bytes moved are what an operation has to read and write once, not what a kernel happens to.

    Attributes:
        shape: Of the model.
        context_tokens: Length of every history.
        batch: Sequences of a step.
        cache_bytes: Of the device's last cache; 0 keeps one layer of each buffer.
        copy_bytes: Size of the buffer whose copy is the measure of bandwidth.
    """

    shape: KernelShape
    context_tokens: int
    batch: int
    cache_bytes: int
    copy_bytes: int

    @property
    def room_tokens(self) -> int:
        """Places behind the tokens for those that steps append."""
        return max((1, *self.shape.block_queries))

    def layers_apart(self, layer_bytes: int) -> int:
        """How many layers get buffers of their own; the others use these again in turn."""
        wanted = -(-_CACHES_FULL * self.cache_bytes // layer_bytes)
        return min(self.shape.layers, max(1, wanted))

    def is_cached(self, layer_bytes: int) -> bool:
        """Whether all layers together are so small that reads may come from the cache."""
        return self.layers_apart(layer_bytes) * layer_bytes < 2 * self.cache_bytes

    @property
    def linear_problem(self) -> str | None:
        """Why the linear layers are left out; None if they are measured."""
        if self.shape.linear is None:
            return "their sizes are not given"
        if self.batch > MOST_ROWS:
            return f"the kernels take up to {MOST_ROWS} rows, steps of more sequences run torch's"
        return None

    @property
    def linear_layers(self) -> dict[str, LinearLayer]:
        """The linear layers that are measured, by name."""
        shape = self.shape
        if shape.linear is None or self.linear_problem is not None:
            return {}
        return shape.linear.layers(
            shape.query_heads * shape.head_size, shape.kv_heads * shape.head_size
        )

    def linear_weight_bytes(self, layer: LinearLayer) -> int:
        return layer.weight_elements * self.shape.dtype.itemsize

    def extent_bytes(self, tokens: int) -> int:
        """Keys and values of one layer, all sequences, without the room behind them."""
        return tokens * self.shape.token_bytes * self.batch

    def evidence_bytes(self, element_bytes: int) -> int:
        """Logits of one layer for one asked query, all heads and sequences."""
        return self.batch * self.shape.query_heads * self.context_tokens * element_bytes

    # ------------------------------------------------------------------ moved

    def attention_bytes(self, tokens: int, queries: int, *, evidence: bool = False) -> int:
        """One layer: keys and values, queries and outputs, the new tokens twice, evidence."""
        shape = self.shape
        row = shape.query_heads * shape.head_size * shape.dtype.itemsize
        sequences = self.batch * queries
        moved = self.extent_bytes(tokens) + 2 * sequences * (row + shape.token_bytes)
        return moved + (self.evidence_bytes(4) if evidence else 0)

    def sdpa_bytes(self, tokens: int, queries: int) -> int:
        """One layer of a function that appends nothing: the new tokens lie there already."""
        shape = self.shape
        row = shape.query_heads * shape.head_size * shape.dtype.itemsize
        return self.extent_bytes(tokens + queries) + 2 * self.batch * queries * row

    def linear_bytes(self, layer: LinearLayer) -> int:
        """Weights once, a row per sequence of inputs and results."""
        rows = self.batch * layer.row_elements * self.shape.dtype.itemsize
        return self.linear_weight_bytes(layer) + rows

    @property
    def selected_rows(self) -> int:
        """Layers x sequences x KV heads: each has a selection of its own."""
        return self.shape.layers * self.batch * self.shape.kv_heads

    def rank_bytes(self, element_bytes: int, peak_tokens: int) -> int:
        """All layers: evidence read, a key per token and a peak per few of them written."""
        peaks = -(-self.context_tokens // peak_tokens)
        keys = (self.context_tokens + peaks) * _KEY_BYTES * self.selected_rows
        return self.evidence_bytes(element_bytes) * self.shape.layers + keys

    def select_bytes(self, peak_tokens: int) -> int:
        """All layers: peaks, the keys of as many blocks as are selected, positions written."""
        peaks = -(-self.context_tokens // peak_tokens)
        keys = min(self.context_tokens, self.shape.selected_tokens * peak_tokens)
        written = self.shape.selected_tokens * _POSITION_BYTES
        return ((peaks + keys) * _KEY_BYTES + written) * self.selected_rows

    @property
    def gather_bytes(self) -> int:
        """All layers: positions, and every token of the memories read and written."""
        positions = self.shape.selected_tokens * _POSITION_BYTES * self.selected_rows
        return 2 * self.extent_bytes(self.shape.memory_tokens) * self.shape.layers + positions

    # ------------------------------------------------------------------ needed

    def needed_bytes(self) -> dict[str, int]:
        """Bytes of every buffer that a run of this workload allocates, by part."""
        shape = self.shape
        history, memory = (self.extent_bytes(n) for n in (self.context_tokens, shape.memory_tokens))
        room = self.extent_bytes(self.room_tokens + _ROOM_STEP)
        capacity = self.context_tokens + self.room_tokens + _SCRATCH_STEP
        peaks = min(capacity, _MOST_PEAKS)
        evidence = self.batch * shape.query_heads * capacity
        weights = [self.linear_weight_bytes(layer) for layer in self.linear_layers.values()]
        return {
            "history": self.layers_apart(history) * (history + room),
            "memory": self.layers_apart(memory) * (memory + room),
            "evidence": sum(
                self.layers_apart(self.evidence_bytes(size)) * evidence * size for size in (4, 2)
            ),
            "ranking": self.selected_rows * (2 * capacity + peaks) * _KEY_BYTES,
            # Those that are gathered, and those that selecting returns, eagerly and captured.
            "positions": 3 * self.selected_rows * shape.selected_tokens * _POSITION_BYTES,
            "linear layers": sum(self.layers_apart(size) * size for size in weights),
            "copy": 2 * self.copy_bytes,
        }
