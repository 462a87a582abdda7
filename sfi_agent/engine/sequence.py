"""The state of one sequence: a history and, on sparse layers, a memory per layer.

Invariant between steps: every layer's history holds all processed tokens, except that the fast
tokens of the open segment live in the memory of sparse layers until `flush_segment` copies them
over or `drop_segment` forgets them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.engine.history import LayerHistory, MoveCounter
from sfi_agent.engine.host_history import HostStore
from sfi_agent.engine.memory import LayerMemory, MemoryLayout

__all__ = ["LayerState", "SequenceState"]

_UNKNOWN_RULE = AttentionRule(1.0)


@dataclass(slots=True)
class LayerState:
    """One attention layer of one sequence.

    Attributes:
        history: All keys and values.
        window: Band width of a sliding-window layer in tokens, None for full attention.
        memory: What fast steps attend to; None on dense and sliding layers, which write and read
            their history at every step.
        captured_query: `[query_heads, rows, key_dim]`, the newest post-RoPE queries of the last
            dense step that was asked for evidence.
        rule: How products become attention weights, known after the first step.
    """

    history: LayerHistory
    window: int | None = None
    memory: LayerMemory | None = None
    captured_query: Tensor | None = None
    rule: AttentionRule = _UNKNOWN_RULE


class SequenceState:
    """Keys and values of one sequence, ready for its next step.

    Args:
        windows: Per layer the sliding window in tokens, or None.
        layout: The shared memory layout; None in dense mode.
        dense_layers: Layers that attend the whole history at every step.
        reserve_tokens: Capacity to allocate at once in every layer.
        store: The host memory for the history of layers that do not read it at every step: those
            with a memory, and in dense mode those without a window. None keeps everything on the
            model's device.

    Attributes:
        processed_tokens: How many tokens the model has seen.
        moves: See `LayerHistory`.
    """

    def __init__(
        self,
        windows: tuple[int | None, ...],
        layout: MemoryLayout | None,
        dense_layers: frozenset[int],
        reserve_tokens: int = 0,
        store: HostStore | None = None,
    ) -> None:
        self.layout = layout
        self.processed_tokens = 0
        self.moves = MoveCounter()
        self.layers: list[LayerState] = []
        for index, window in enumerate(windows):
            sparse = layout is not None and window is None and index not in dense_layers
            memory = LayerMemory(layout) if sparse and layout is not None else None
            away = store if sparse or (layout is None and window is None) else None
            self.layers.append(LayerState(LayerHistory(reserve_tokens, away), window, memory))
            self.layers[-1].history.moves = self.moves

    @property
    def history_bytes(self) -> int:
        """Bytes of the history buffers this sequence owns (shared extents belong to a parent)."""
        return sum(layer.history.owned_bytes for layer in self.layers)

    @property
    def host_bytes(self) -> int:
        """How many of these are in host memory."""
        owned = [buffer for layer in self.layers for buffer in layer.history.owned_buffers]
        return sum(buffer.nbytes for buffer in owned if buffer.home is not None)

    @property
    def streamed(self) -> bool:
        """Whether the history of some layer is in host memory, so that dense steps stream it."""
        return any(layer.history.streamed for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        return sum(layer.memory.bytes for layer in self.layers if layer.memory is not None)

    @property
    def segment_tokens(self) -> int:
        return self.layout.segment_tokens if self.layout is not None else 0

    @property
    def visible_tokens(self) -> int:
        """Tokens a fast step could attend to now, averaged over sparse layers and KV heads; the
        whole history where no memory is ready."""
        if self.layout is None or not self.layout.ready:
            return self.processed_tokens
        return self.layout.visible_tokens

    def expect(self, tokens: int) -> None:
        """So many tokens are about to be processed: host memory is taken for all of them at once,
        in few buffers."""
        for layer in self.layers:
            history = layer.history
            if history.store is not None:
                history.reserve_tokens = max(history.reserve_tokens, history.tokens + tokens)

    def flush_segment(self) -> None:
        """Copy the open segment's keys and values from the memory into the history."""
        tokens = self.segment_tokens
        if not tokens or self.layout is None:
            return
        for layer in self.layers:
            if layer.memory is not None and layer.history.tokens < self.processed_tokens:
                layer.history.append(*layer.memory.segment(tokens))
        self.end_segment()

    def end_segment(self) -> None:
        """The open segment's keys and values are in the history now, or will be computed anew."""
        if self.layout is not None and self.segment_tokens:
            self.layout.advance(-self.segment_tokens)
            self.layout.ready = False

    def drop_segment(self) -> None:
        """Forget the open segment's keys and values, so that its tokens can be processed densely.

        Every layer then holds the tokens before the segment and no others.
        """
        tokens = self.segment_tokens
        if tokens and self.layout is not None:
            self.layout.advance(-tokens)
            self.cut(self.processed_tokens - tokens)

    def discard_fast_token(self) -> None:
        """Take back the last fast step, so that its token can be processed densely."""
        assert self.layout is not None and self.layout.segment_tokens
        self.layout.advance(-1)
        self.processed_tokens -= 1
        self.settle()

    def settle(self) -> None:
        """Drop what an interrupted step left behind its last processed token."""
        for layer in self.layers:
            expected = self.processed_tokens
            if layer.memory is not None:
                expected -= self.segment_tokens
            if layer.history.tokens > expected:
                layer.history.cut(expected)

    def cut(self, tokens: int) -> None:
        """Forget everything from position `tokens` on; the segment must have been flushed."""
        assert not self.segment_tokens, "flush the segment before cutting"
        for layer in self.layers:
            layer.history.cut(tokens)
        self.processed_tokens = tokens
        if self.layout is not None:
            self.layout.ready = False

    def move_history_to(self, other: SequenceState) -> None:
        """Give the history to a fresh sequence of the same model and policy; this one is done."""
        assert not self.segment_tokens, "flush the segment before moving"
        for own, taker in zip(self.layers, other.layers, strict=True):
            taker.history, taker.rule = own.history, own.rule
            taker.history.moves = other.moves
        other.processed_tokens = self.processed_tokens

    def share_history_with(self, child: SequenceState) -> None:
        """Let a fresh sequence of the same model read this one's history; nothing is copied."""
        assert not self.segment_tokens, "flush the segment before forking"
        for own, other in zip(self.layers, child.layers, strict=True):
            # What the child adds goes where its own policy says.
            store = other.history.store
            other.history = own.history.fork()
            other.history.store = store
            other.history.moves = child.moves
        child.moves.count += 1
        child.processed_tokens = self.processed_tokens
