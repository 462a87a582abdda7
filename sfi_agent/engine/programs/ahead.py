"""Fast steps that are begun before anybody has looked at their token.

The token is on the device already, so the device need not wait for the host to read it and ask the
detectors. If a boundary, a retry or a stop says otherwise, what was begun is left alone: it wrote
behind the end of everything, and nobody reads there. So nothing depends on whether it happened.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from sfi_agent.engine.programs.control import CHAINED, FAST, SlotStep
from sfi_agent.engine.programs.program import PendingStep, StepProgram
from sfi_agent.engine.programs.slot_steps import mode_of, sampler_of
from sfi_agent.engine.requests import DenseStep, FastStep
from sfi_agent.engine.sampling import OverridingChooser, TokenChooser
from sfi_agent.engine.sequence import SequenceState

__all__ = ["Ahead", "begin_next", "continues"]


@dataclass(slots=True)
class Ahead:
    """A fast step that was begun early.

    Attributes:
        sequence: Whose step it is.
        position: Of the token that it processes.
        token_id: That token, once it is known.
        chooser: Draws what comes after it.
        program: Runs it.
        pending: Its results.
    """

    sequence: weakref.ref[SequenceState]
    position: int
    token_id: int
    chooser: TokenChooser
    program: StepProgram
    pending: PendingStep


def continues(ahead: Ahead, requests: Sequence[FastStep | DenseStep]) -> bool:
    """Whether the step that was begun is the one that is asked for."""
    request = requests[0]
    return (
        len(requests) == 1
        and isinstance(request, FastStep)
        and request.sequence is ahead.sequence()
        and request.sequence.processed_tokens == ahead.position
        and request.token_id == ahead.token_id
        and request.drawing.chooser == ahead.chooser
        and not request.drawing.with_logits
        and mode_of(requests) == ahead.program.mode
    )


def begin_next(program: StepProgram, slot: int, request: FastStep | DenseStep) -> Ahead | None:
    """Start the fast step over the token that is being drawn, where one is likely to follow.

    Args:
        program: The one that draws it.
        slot: Of the sequence.
        request: The step under way, already noted in the sequence's state.

    Returns:
        None where no step was begun. Its `token_id` is unknown yet.
    """
    if program.cohort.batch > 1 or not isinstance(request, FastStep) or not request.may_continue:
        # In a batch a row that turns slow would step alone while the others are ahead.
        return None
    sampler, layout = sampler_of(request.drawing), request.sequence.layout
    assert sampler is not None and layout is not None
    if request.drawing.with_logits or layout.end >= layout.capacity:
        return None
    position, chooser = request.sequence.processed_tokens, request.drawing.chooser
    token = chooser.at(position, CHAINED) if isinstance(chooser, OverridingChooser) else CHAINED
    pending = program.run({slot: SlotStep(FAST, layout.end, position, (token,), sampler)})
    return Ahead(weakref.ref(request.sequence), position, CHAINED, chooser, program, pending)
