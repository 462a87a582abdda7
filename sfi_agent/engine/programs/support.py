"""Which requests programs can execute, and why not the others."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from sfi_agent.engine.kernels import kernel_problem, uses_kernels
from sfi_agent.engine.programs.cohort import Geometry, geometry_of, read_histories
from sfi_agent.engine.programs.slot_steps import sampler_of
from sfi_agent.engine.requests import BlockStep, DenseStep, FastStep
from sfi_agent.engine.sequence import SequenceState

__all__ = ["LARGEST_BLOCK", "Support"]

LARGEST_BLOCK = 128
"""Tokens of one block at most; prefills are longer and bound by arithmetic."""

_MOST_EXTENTS = 8


class _Known(NamedTuple):
    """What was found out about a sequence.

    Attributes:
        moves: Of the sequence then; when it has moved, it is found out anew.
        geometry: See `geometry_of`.
        reads: Whether programs read the history of some layer: some is on the device.
        streamed: Whether the history of some layer is in host memory.
        fast_streamed: Whether that is so for a layer that fast steps read the history of.
    """

    moves: int
    geometry: Geometry | None
    reads: bool
    streamed: bool
    fast_streamed: bool


class Support:
    """See the module text; what it finds out is kept.

    Args:
        device: Where the steps run.
        kernels: Whether programs need the step kernels, not their references.
    """

    def __init__(self, device: torch.device, *, kernels: bool) -> None:
        self._device = device
        self._kernels = kernels
        self._known: WeakKeyDictionary[SequenceState, _Known] = WeakKeyDictionary()
        self._canonical: dict[Geometry, Geometry] = {}
        self._problems: dict[Geometry, str | None] = {}

    def problem(self, request: DenseStep | FastStep | BlockStep) -> str | None:
        """What keeps a request from programs, in words; None if nothing does."""
        if not request.sequence.processed_tokens:
            return "an empty history"
        found = _fast_problem(request) if isinstance(request, FastStep) else _dense_problem(request)
        if found is not None:
            return found
        if sampler_of(request.drawing) is None:
            return "a chooser of its own"
        found = self._host_problem(request)
        if found is not None:
            return found
        geometry = self.geometry(request.sequence)
        if geometry is None:
            return "layers of different head sizes"
        if geometry.extents > _MOST_EXTENTS:
            return f"a history of more than {_MOST_EXTENTS} extents"
        return self._kernel_problem(geometry)

    def geometry(self, sequence: SequenceState) -> Geometry | None:
        """See `geometry_of`."""
        return self._look(sequence).geometry

    def read_tokens(self, sequence: SequenceState) -> int:
        """Tokens of a sequence that programs may have to read; 0 where they read memories alone."""
        return sequence.processed_tokens if self._look(sequence).reads else 0

    def _look(self, sequence: SequenceState) -> _Known:
        known = self._known.get(sequence)
        if known is None or known.moves != sequence.moves.count:
            found = geometry_of(sequence)
            # One object for all that are equal, which makes comparing them quick.
            found = self._canonical.setdefault(found, found) if found is not None else None
            away = [layer for layer in sequence.layers if layer.history.streamed]
            known = _Known(
                sequence.moves.count,
                found,
                reads=bool(read_histories(sequence)),
                streamed=bool(away),
                fast_streamed=any(layer.memory is None for layer in away),
            )
            self._known[sequence] = known
        return known

    def _host_problem(self, request: DenseStep | FastStep | BlockStep) -> str | None:
        known = self._look(request.sequence)
        if isinstance(request, FastStep):
            return "a dense layer with its history in host memory" if known.fast_streamed else None
        return "a history in host memory" if known.streamed else None

    def _kernel_problem(self, geometry: Geometry) -> str | None:
        if geometry not in self._problems:
            found = None
            sizes = geometry.key_dim, geometry.value_dim
            # Asked first, because it says so with a warning: it concerns every step of the model.
            if self._kernels and not uses_kernels(self._device, geometry.dtype, *sizes):
                found = kernel_problem(self._device, geometry.dtype, *sizes)
            self._problems[geometry] = found
        return self._problems[geometry]


def _fast_problem(request: FastStep) -> str | None:
    if request.measure_mass:
        return "a detector that needs attention_drift"
    if request.on_fast_attention is not None:
        return "an instrument that watches attention"
    return None


def _dense_problem(request: DenseStep | BlockStep) -> str | None:
    if len(request.ids) > LARGEST_BLOCK:
        return f"a block of more than {LARGEST_BLOCK} tokens"
    if isinstance(request, BlockStep):
        return "a block in several parts" if request.continues else None
    if request.interrupted is not None and (len(request.ids) > 1 or request.interrupted()):
        return "a prefill"
    return "several evidence queries" if request.evidence_rows > 1 else None
