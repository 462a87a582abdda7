"""Histories that go into files or come out of them, as tensors and lengths: no file is opened here.

What is read back has the extents that were saved, because the order in which attention adds up
depends on them: a session goes on from a file with the very bits with which it would have gone on
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sfi_agent.engine.history import MINIMUM_GROWTH_TOKENS, Buffer, Extent, LayerHistory
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.switch import AttentionSwitch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sfi_agent.engine.runner import Runner

__all__ = [
    "HistoryForm",
    "LayerSizes",
    "SavedBuffer",
    "SavedPart",
    "form_of",
    "history_parts",
    "layer_sizes",
    "model_layers",
    "parts_between",
    "restore_history",
]


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """What the keys and values of one layer have in common.

    Attributes:
        kv_heads: First size of both.
        key_dim: Last size of the keys.
        value_dim: Last size of the values.
        dtype: Of both.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HistoryForm:
    """How the tokens of a sequence lie in extents; the same in all of its layers.

    Attributes:
        extent_tokens: Tokens of each extent, in order.
        continues_last: Whether the next token is written behind the last extent; otherwise it
            begins one of its own, as it does after a fork.
    """

    extent_tokens: tuple[int, ...]
    continues_last: bool


@dataclass(frozen=True, slots=True)
class SavedPart:
    """Consecutive tokens of one layer.

    Attributes:
        keys: `[kv_heads, tokens, key_dim]`.
        values: `[kv_heads, tokens, value_dim]`.
        read_ahead: Tells the system that both are about to be read, where they lie in a file; it
            does not wait for them.
    """

    keys: Tensor
    values: Tensor
    read_ahead: Callable[[], None] | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    def between(self, start: int, end: int) -> SavedPart:
        """A view of some of its tokens."""
        return SavedPart(self.keys[:, start:end], self.values[:, start:end], self.read_ahead)


class SavedBuffer(Buffer):
    """Storage of one extent whose tokens lie in mapped files until they are needed elsewhere.

    It has no room: the history that goes on behind it moves its tokens into memory, as it does
    when any buffer is full. Forks read the map where it is; tokens of several files are joined
    once, for all who read them.

    Args:
        parts: The tokens in order, at least one.
        reserve_tokens: Room that the buffer in memory will have at least.
        following: What is read after them, as a rule: the parts of the next layer.
    """

    def __init__(
        self,
        parts: Sequence[SavedPart],
        reserve_tokens: int = 0,
        following: Sequence[SavedPart] = (),
    ) -> None:
        super().__init__(torch.empty(0), torch.empty(0))
        # Missing until somebody asks: see __getattr__.
        del self.keys, self.values
        self._parts = tuple(parts)
        self._reserve_tokens = reserve_tokens
        self._following = tuple(following)

    def __getattr__(self, name: str) -> Tensor:
        """Keys or values, once: from then on they are ordinary attributes."""
        if name not in ("keys", "values"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._read_ahead()
        tensors: list[Tensor] = [getattr(part, name) for part in self._parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
        setattr(self, name, tensor)
        return tensor

    @property
    def capacity(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:
        """Of memory; what is mapped belongs to the file."""
        if len(self._parts) == 1:
            return 0
        joined = (self.__dict__.get(name) for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in joined if tensor is not None)

    def grown(self, capacity: int, used: int) -> Buffer:
        room = max(capacity, self._reserve_tokens, used + max(used // 8, MINIMUM_GROWTH_TOKENS))
        parts = list(parts_between(self._parts, 0, used))
        self._read_ahead()
        return _gathered(parts, room, parts[0].keys.device)

    def between(self, start: int, end: int) -> Iterator[SavedPart]:
        """Views of some of the tokens, without joining anything."""
        return parts_between(self._parts, start, end)

    def _read_ahead(self) -> None:
        # The next layer comes from the disk while this one is copied and computed with.
        _read_ahead(self._parts)
        _read_ahead(self._following)


def parts_between(parts: Sequence[SavedPart], start: int, end: int) -> Iterator[SavedPart]:
    """Those tokens of consecutive parts that lie from `start` up to `end`, as views."""
    offset = 0
    for part in parts:
        low, high = max(start - offset, 0), min(end - offset, part.tokens)
        if low < high:
            yield part.between(low, high)
        offset += part.tokens


def history_parts(history: LayerHistory, start: int, end: int) -> Iterator[SavedPart]:
    """Tokens of a history as views, in order; nothing is joined or moved."""
    history.settle()
    offset = 0
    for extent in history.extents:
        low, high = max(start - offset, 0), min(end - offset, extent.tokens)
        if low < high and isinstance(extent.buffer, SavedBuffer):
            yield from extent.buffer.between(low, high)
        elif low < high:
            yield SavedPart(extent.buffer.keys, extent.buffer.values).between(low, high)
        offset += extent.tokens


def layer_sizes(history: LayerHistory) -> LayerSizes:
    """The sizes of a history that holds at least one token."""
    part = next(history_parts(history, 0, 1))
    kv_heads, _, key_dim = part.keys.shape
    return LayerSizes(kv_heads, key_dim, part.values.shape[-1], part.keys.dtype)


def form_of(sequence: SequenceState) -> HistoryForm:
    """The extents of a sequence between two decodings.

    Those in host memory are chunks, which say nothing about its past.
    """
    tokens = sequence.processed_tokens
    histories = [layer.history for layer in sequence.layers if not layer.history.streamed]
    if not tokens or not histories:
        return HistoryForm((tokens,) if tokens else (), True)
    forms = {tuple(extent.tokens for extent in history.extents) for history in histories}
    assert len(forms) == 1, f"layers differ in their extents: {forms}"
    last = histories[0].extents[-1]
    return HistoryForm(forms.pop(), last.owned and last.tokens >= last.buffer.shared_tokens)


def restore_history(
    sequence: SequenceState,
    layers: Sequence[Sequence[SavedPart]],
    form: HistoryForm,
    device: torch.device,
) -> None:
    """Give a fresh sequence the tokens that lie in files.

    On a CPU nothing is copied and the extents are those that were saved. Elsewhere layer after
    layer goes into one buffer on the device, or into host memory where the sequence keeps its
    history there.

    Args:
        sequence: Without any token.
        layers: Per layer its parts in order, on the CPU, at least one.
        form: The extents that they had, as long as the parts together.
        device: Of the model.
    """
    tokens = sum(form.extent_tokens)
    for state, parts, following in zip(sequence.layers, layers, [*layers[1:], ()], strict=True):
        history = state.history
        if device.type == "cpu" and history.store is None:
            _map_extents(history, parts, form, following)
            continue
        _read_ahead(parts)
        _read_ahead(following)
        if history.store is not None:
            for part in parts:
                history.append(part.keys, part.values)
        else:
            room = max(history.reserve_tokens, tokens + max(tokens // 8, MINIMUM_GROWTH_TOKENS))
            history.extents.append(Extent(_gathered(parts, room, device), tokens, owned=True))
    sequence.processed_tokens = tokens
    sequence.moves.count += 1


def model_layers(runner: Runner) -> tuple[LayerSizes, ...]:
    """The sizes that a model gives to the keys and values of its layers, found by one token."""
    model = runner.model
    known = _known_layers.get(model)
    dtype = runner.shape.dtype
    if known is None or known[0] != dtype:
        sequence = SequenceState(runner.shape.windows, None, frozenset())
        with AttentionSwitch.of(model).switched_on(model):
            runner.process(sequence, [0])
        known = dtype, tuple(layer_sizes(layer.history) for layer in sequence.layers)
        _known_layers[model] = known
    return known[1]


_known_layers: WeakKeyDictionary[PreTrainedModel, tuple[torch.dtype, tuple[LayerSizes, ...]]] = (
    WeakKeyDictionary()
)


def _read_ahead(parts: Sequence[SavedPart]) -> None:
    for part in parts:
        if part.read_ahead is not None:
            part.read_ahead()


def _map_extents(
    history: LayerHistory,
    parts: Sequence[SavedPart],
    form: HistoryForm,
    following: Sequence[SavedPart],
) -> None:
    offset = 0
    for index, tokens in enumerate(form.extent_tokens, start=1):
        own = list(parts_between(parts, offset, offset + tokens))
        continues = form.continues_last and index == len(form.extent_tokens)
        buffer = SavedBuffer(own, history.reserve_tokens, following)
        history.extents.append(Extent(buffer, tokens, owned=continues))
        offset += tokens


def _gathered(parts: Sequence[SavedPart], room: int, device: torch.device) -> Buffer:
    """A buffer of its own with copies of the parts at its beginning."""
    first = parts[0]
    keys = first.keys.new_empty(first.keys.shape[0], room, first.keys.shape[2], device=device)
    values = first.values.new_empty(keys.shape[0], room, first.values.shape[2], device=device)
    offset = 0
    for part in parts:
        keys[:, offset : offset + part.tokens] = part.keys
        values[:, offset : offset + part.tokens] = part.values
        offset += part.tokens
    return Buffer(keys, values)
