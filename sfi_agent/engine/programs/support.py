"""Which requests programs can execute, and why not the others."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from sfi_agent.engine.kernels import kernel_problem, uses_kernels
from sfi_agent.engine.programs.cohort import Geometry, geometry_of
from sfi_agent.engine.programs.slot_steps import sampler_of
from sfi_agent.engine.requests import BlockStep, DenseStep, FastStep
from sfi_agent.engine.sequence import SequenceState

__all__ = ["LARGEST_BLOCK", "Support"]

LARGEST_BLOCK = 128
"""Tokens of one block at most; prefills are longer and bound by arithmetic."""

_MOST_EXTENTS = 8


class Support:
    """See the module text; what it finds out is kept.

    Args:
        device: Where the steps run.
        kernels: Whether programs need the step kernels, not their references.
    """

    def __init__(self, device: torch.device, *, kernels: bool) -> None:
        self._device = device
        self._kernels = kernels
        self._geometries: WeakKeyDictionary[SequenceState, tuple[int, Geometry | None]]
        self._geometries = WeakKeyDictionary()
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
        geometry = self.geometry(request.sequence)
        if geometry is None:
            return "layers of different head sizes"
        if geometry.extents > _MOST_EXTENTS:
            return f"a history of more than {_MOST_EXTENTS} extents"
        return self._kernel_problem(geometry)

    def geometry(self, sequence: SequenceState) -> Geometry | None:
        """See `geometry_of`."""
        known = self._geometries.get(sequence)
        if known is None or known[0] != sequence.moves.count:
            found = geometry_of(sequence)
            # One object for all that are equal, which makes comparing them quick.
            found = self._canonical.setdefault(found, found) if found is not None else None
            known = (sequence.moves.count, found)
            self._geometries[sequence] = known
        return known[1]

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
