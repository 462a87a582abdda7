"""Histories of random keys and values that all arms read, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sfi_agent.engine.decoding_state import DecodingState
from sfi_agent.engine.history import Buffer, Extent, LayerHistory
from sfi_agent.engine.memory import MemoryLayout
from sfi_agent.engine.sequence import SequenceState

if TYPE_CHECKING:
    from sfi_agent.engine.host_history import HostStore
    from sfi_agent.engine.model_shape import ModelShape
    from sfi_agent.evaluation.decode_benchmark.setting import Setting

__all__ = ["Histories"]

_FILL_CHUNK_TOKENS = 2048
_KEY_SCALE = 2.5
"""Spread of the logits of attention where queries have unit variance: the heaviest of 100,000
tokens then gets some per cent of the attention, as in a trained model, neither all nor nothing."""


class Histories:
    """The sequences of a batch, twice: for slow-fast decoding and for dense decoding.

    Both write to the same buffers, behind the same context. Arms run one after the other, and each
    leaves the sequences as it found them (`rewind`).

    Args:
        shape: Of the model.
        setting: What is benchmarked.
        store: The host memory that histories are kept in; None keeps them on the device.

    Attributes:
        context_tokens: Length of each history.
        sparse: A decoding per sequence, with a memory.
        dense: The same without.
    """

    def __init__(self, shape: ModelShape, setting: Setting, store: HostStore | None = None) -> None:
        self._shape, self._sizes = shape, setting.sizes
        self._seed = setting.options.seed
        self.context_tokens = setting.context_tokens
        vocabulary = setting.sizes.vocabulary_size
        self._ids = [(index * 7 + self._seed) % vocabulary for index in range(self.context_tokens)]
        self._ids.append(11 % vocabulary)
        self.sparse: list[DecodingState] = []
        self.dense: list[DecodingState] = []
        self._buffers: list[list[Buffer]] = []
        memory = setting.config.memory
        # Room for what arms append, so that nothing moves while it is timed.
        capacity = self.context_tokens + setting.room_tokens
        for _ in range(setting.options.batch):
            layout = MemoryLayout(
                memory.sink_tokens, memory.selected_tokens, memory.recent_tokens, shape.device
            )
            layers = frozenset(memory.dense_layers)
            sequence = SequenceState(shape.windows, layout, layers, capacity, store)
            self.sparse.append(DecodingState(list(self._ids), sequence))

    @property
    def batch(self) -> int:
        return len(self.sparse)

    @property
    def history_bytes(self) -> int:
        return sum(state.sequence.history_bytes for state in self.sparse)

    @property
    def host_bytes(self) -> int:
        """How many of the histories' bytes are in host memory."""
        return sum(state.sequence.host_bytes for state in self.sparse)

    @property
    def memory_bytes(self) -> int:
        return sum(state.sequence.memory_bytes for state in self.sparse)

    def fill(self, on_progress: Callable[[str], None]) -> None:
        """Draw keys and values, and let the dense sequences read them too."""
        for index, state in enumerate(self.sparse):
            on_progress(f"sequence {index + 1} of {self.batch}")
            generator = torch.Generator(self._shape.device).manual_seed(self._seed + index)
            for layer in state.sequence.layers:
                self._fill_layer(layer.history, generator)
            state.sequence.processed_tokens = self.context_tokens
            sequence = _reader(state.sequence, self._shape)
            self.dense.append(DecodingState(list(self._ids), sequence))
        self.rewind()
        self._buffers = self._present()

    def rewind(self) -> None:
        """Every arm starts from the same ids and histories: the last id is pending.

        Segments have been flushed or dropped.
        """
        for state in (*self.sparse, *self.dense):
            state.keep(self.context_tokens + 1)
            state.prompt_start = self.context_tokens
            state.sequence.cut(self.context_tokens)

    def check(self) -> None:
        """Nothing moved, grew or stayed behind; a bug of an arm otherwise."""
        for state in (*self.sparse, *self.dense):
            assert state.unprocessed == self._ids[-1:], "an arm left ids behind"
            for layer in state.sequence.layers:
                assert layer.history.tokens == self.context_tokens, "an arm left tokens behind"
        assert self._present() == self._buffers, "a buffer was moved, or an extent begun"
        half = len(self._buffers) // 2
        assert self._buffers[:half] == self._buffers[half:], "dense arms read other buffers"

    def _present(self) -> list[list[Buffer]]:
        """Buffers of every layer, those of the sparse sequences first."""
        sequences = [state.sequence for state in (*self.sparse, *self.dense)]
        layers = [layer for sequence in sequences for layer in sequence.layers]
        return [[extent.buffer for extent in layer.history.extents] for layer in layers]

    def _fill_layer(self, history: LayerHistory, generator: torch.Generator) -> None:
        sizes, shape = self._sizes, self._shape
        for start in range(0, self.context_tokens, _FILL_CHUNK_TOKENS):
            tokens = min(_FILL_CHUNK_TOKENS, self.context_tokens - start)
            keys, values = (
                torch.randn(
                    (sizes.kv_heads, tokens, sizes.head_size),
                    generator=generator,
                    device=shape.device,
                    dtype=shape.dtype,
                )
                for _ in range(2)
            )
            history.append(keys.mul_(_KEY_SCALE), values)


def _reader(sequence: SequenceState, shape: ModelShape) -> SequenceState:
    """A sequence of mode dense over the same buffers, which it may write to as well."""
    reader = SequenceState(shape.windows, None, frozenset())
    for own, other in zip(sequence.layers, reader.layers, strict=True):
        other.history.store = own.history.store
        other.history.extents += [
            Extent(extent.buffer, extent.tokens, owned=True) for extent in own.history.extents
        ]
    # Where tokens lie has changed for whoever looked before.
    reader.moves.count += 1
    reader.processed_tokens = sequence.processed_tokens
    return reader
