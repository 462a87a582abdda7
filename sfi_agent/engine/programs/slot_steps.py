"""Requests as numbers for slots, and what a step leaves behind in a sequence's state."""

from __future__ import annotations

from collections.abc import Sequence

from sfi_agent.engine.decoding_state import Choice
from sfi_agent.engine.programs.cohort import shared_tokens
from sfi_agent.engine.programs.control import CHAINED, FAST, SLOW, SlotStep
from sfi_agent.engine.programs.program import DrawMode, PendingStep, StepProgram
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    Drawing,
    FastStep,
    RefreshStep,
    StepRequest,
)
from sfi_agent.engine.sampling import AllowedTokens, OverridingChooser, Sampler
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.protocols import Ranking, Selector, declared_ranking

__all__ = [
    "choices_of",
    "kind_of",
    "make_room",
    "mode_of",
    "next_slot_step",
    "note_step",
    "prompt_end",
    "ranking_of",
    "sampler_of",
    "shared_end",
    "slot_step",
]

LEAST_SHARED_TOKENS = 1024
"""Shorter shared prefixes are read row by row: a second launch and a merge cost more."""


def kind_of(request: StepRequest) -> str:
    """What kind of step a request is: refresh, fast, block, mixed or dense."""
    if isinstance(request, RefreshStep):
        return "refresh"
    if isinstance(request, FastStep):
        return "fast"
    if isinstance(request, BlockStep) or len(request.ids) > 1:
        return "block"
    return "mixed" if request.refresh is not None else "dense"


def selector_of(request: StepRequest) -> Selector | None:
    """The selector of the refresh that a request asks for."""
    if isinstance(request, RefreshStep):
        return request.order.selector
    if isinstance(request, DenseStep) and request.refresh is not None:
        return request.refresh.selector
    return None


def ranking_of(request: StepRequest) -> Ranking | None:
    """What that selector promises to choose, if it promises anything."""
    selector = selector_of(request)
    return declared_ranking(selector) if selector is not None else None


def sampler_of(drawing: Drawing) -> Sampler | None:
    """The sampler that draws on the device; None for choosers that programs do not know."""
    chooser = drawing.chooser
    if isinstance(chooser, AllowedTokens):
        chooser = chooser.chooser
    inner = chooser.sampler if isinstance(chooser, OverridingChooser) else chooser
    return inner if isinstance(inner, Sampler) else None


def mode_of(requests: Sequence[FastStep | DenseStep | BlockStep]) -> DrawMode:
    """What the draw of a step has to do."""
    samplers = [sampler for r in requests if (sampler := sampler_of(r.drawing)) is not None]
    return DrawMode(
        greedy=all(sampler.temperature == 0.0 for sampler in samplers),
        filtered=any(
            sampler.temperature > 0.0 and (sampler.top_k > 0 or sampler.top_p < 1.0)
            for sampler in samplers
        ),
        with_entropy=any(request.drawing.with_entropy for request in requests),
    )


def make_room(request: FastStep | DenseStep) -> None:
    """Room in every history that the step, and one begun ahead of it, may write to."""
    sequence = request.sequence
    if isinstance(request, FastStep):
        for layer in sequence.layers:
            if layer.memory is None:
                layer.history.make_room(2)
        return
    new = 2 + (sequence.segment_tokens if request.flush_segment else 0)
    for layer in sequence.layers:
        layer.history.make_room(new)


def shared_end(requests: Sequence[FastStep | DenseStep | BlockStep]) -> int:
    """How long a prefix the rows of a step share, where reading it once is worth a launch.

    Slow steps that leave evidence do so row by row: they are staggered, so that no two of them
    meet often.
    """
    if len(requests) < 2:
        return 0
    if any(kind_of(request) not in ("dense", "block") for request in requests):
        return 0
    shared = shared_tokens([request.sequence for request in requests])
    return shared if shared >= LEAST_SHARED_TOKENS else 0


def slot_step(request: FastStep | DenseStep | BlockStep, shared: int) -> SlotStep:
    """A request as numbers for its slot; `shared` tokens are a prefix of all of them."""
    sequence, sampler = request.sequence, sampler_of(request.drawing)
    assert sampler is not None
    processed = sequence.processed_tokens
    if isinstance(request, FastStep):
        assert sequence.layout is not None and sequence.layout.ready
        return SlotStep(FAST, sequence.layout.end, processed, (request.token_id,), sampler)
    return SlotStep(
        SLOW,
        0,
        processed,
        tuple(request.ids),
        sampler,
        prompt_end=prompt_end(sequence),
        shared_end=shared,
    )


def next_slot_step(request: FastStep | DenseStep, shared: int) -> SlotStep | None:
    """The step over the token that a step is drawing, as it will be if nothing intervenes.

    None where it cannot be begun: something else may follow, or there is no room for it.
    """
    sequence, chooser = request.sequence, request.drawing.chooser
    sampler = sampler_of(request.drawing)
    if not request.may_continue or request.drawing.with_logits or sampler is None:
        return None
    if isinstance(chooser, AllowedTokens):
        # The token comes from the host (see `choices_of`), and so does what may follow it.
        return None
    position = sequence.processed_tokens
    token = chooser.at(position, CHAINED) if isinstance(chooser, OverridingChooser) else CHAINED
    if isinstance(request, DenseStep):
        return SlotStep(SLOW, 0, position, (token,), sampler, shared_end=shared)
    layout = sequence.layout
    assert layout is not None
    if layout.end >= layout.capacity:
        return None
    return SlotStep(FAST, layout.end, position, (token,), sampler)


def prompt_end(sequence: SequenceState) -> int:
    """See `Evidence`; 0 where there is none."""
    return (sequence.layout.prompt_end or 0) if sequence.layout is not None else 0


def note_step(request: FastStep | DenseStep | BlockStep, tokens: int) -> None:
    """The step's tokens are where the state says they are."""
    sequence = request.sequence
    fast = isinstance(request, FastStep)
    for layer in sequence.layers:
        if not fast or layer.memory is None:
            layer.history.note_written(tokens)
    sequence.processed_tokens += tokens
    if sequence.layout is not None:
        if fast:
            sequence.layout.advance(tokens)
        else:
            sequence.layout.ready = False


def choices_of(
    pending: PendingStep,
    program: StepProgram,
    slot: int,
    drawing: Drawing,
    first_position: int,
    count: int,
) -> tuple[Choice, ...]:
    """What was drawn behind the first `count` tokens of a slot, for positions from the first on.

    Where tokens are restricted, they are drawn here from the step's logits.
    """
    found = []
    chooser = drawing.chooser
    for row, (token, entropy) in enumerate(pending.read(slot)[:count]):
        position = first_position + row
        if isinstance(chooser, OverridingChooser):
            token = chooser.at(position, token)
        elif isinstance(chooser, AllowedTokens) and position >= chooser.first_position:
            token = int(chooser.choose(program.logits[slot, row], position))
        logits = program.logits[slot, row].clone() if drawing.with_logits else None
        found.append(Choice(token, entropy if drawing.with_entropy else None, None, logits))
    return tuple(found)
