"""The cohorts of a model, and which sequences sit where in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from sfi_agent.engine.programs.ahead import AheadSteps
from sfi_agent.engine.programs.cohort import Cohort, Geometry
from sfi_agent.engine.programs.cohort_programs import CohortPrograms, ProgramOptions
from sfi_agent.engine.programs.support import LARGEST_BLOCK, Support
from sfi_agent.engine.sequence import SequenceState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Seats"]


class Seats:
    """See the module text.

    Args:
        model: Its attention is switched to ours.
        query_heads: Query heads of a layer.
        device: Where everything lives.
        options: How programs are made.

    Attributes:
        support: Which requests can be executed.
        ahead: Steps that were begun; programs that are made anew drop theirs.
        on_evict: Told of a sequence that loses its slot, before it does.
        least_capacity_tokens: Histories that programs are made for at least, so that they need not
            be made anew as a history grows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        query_heads: int,
        device: torch.device,
        options: ProgramOptions,
    ) -> None:
        self._model = model
        self._query_heads = query_heads
        self._device = device
        self._options = options
        self._cohorts: dict[tuple[Geometry, int], CohortPrograms] = {}
        self.support = Support(device, kernels=options.capture)
        self.ahead = AheadSteps()
        self.on_evict: Callable[[CohortPrograms, SequenceState, int], None] = _nobody
        self.least_capacity_tokens = 0

    @property
    def bytes(self) -> int:
        """Of evidence, ranking keys and kept queries of all cohorts."""
        return sum(programs.bytes for programs in self._cohorts.values())

    @property
    def any_made(self) -> bool:
        """Whether some step has been made a program."""
        return any(programs.any_made for programs in self._cohorts.values())

    def take(
        self, sequences: Sequence[SequenceState], batch: int
    ) -> tuple[CohortPrograms, list[int]]:
        """The cohort of these sequences, and their slots in it, with tables up to date."""
        geometry = self.support.geometry(sequences[0])
        assert geometry is not None
        size = max(batch, len(sequences))
        size = 1 << (size - 1).bit_length()
        key = (geometry, size)
        programs = self._cohorts.get(key)
        if programs is None:
            cohort = Cohort(geometry, size, self._device)
            programs = CohortPrograms(self._model, cohort, self._query_heads, self._options)
            cohort.on_evict = partial(self._evicted, programs)
            self._cohorts[key] = programs
        tokens = max(self.support.read_tokens(sequence) for sequence in sequences)
        longest = tokens + LARGEST_BLOCK
        before = programs.capacity
        programs.make_room(max(longest, self.least_capacity_tokens + LARGEST_BLOCK))
        if programs.capacity != before:
            self.ahead.drop(programs.cohort)
        slots = programs.cohort.take_slots(sequences)
        programs.cohort.place(slots, sequences)
        return programs, slots

    def _evicted(self, programs: CohortPrograms, sequence: SequenceState, slot: int) -> None:
        self.on_evict(programs, sequence, slot)


def _nobody(programs: CohortPrograms, sequence: SequenceState, slot: int) -> None:
    return None
