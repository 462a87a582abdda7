"""The steps of a policy on one sequence: prefill, dense, fast, slow, verifying.

Each asks a runner for what it needs (`engine/requests.py`) and leaves the sequence ready for the
next. Which step comes when is the decoder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.decoding_state import Choice, DecodeLimits, DecodingState, StepSettings
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    Drawing,
    FastStep,
    Moves,
    RefreshOrder,
    RefreshStep,
    StepOutcome,
)
from sfi_agent.engine.sampling import AllowedTokens, TokenChooser
from sfi_agent.engine.token_watch import UNWATCHED
from sfi_agent.protocols import Boundary, Selector, StepEvent

__all__ = ["Steps", "Verdict"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifying step found.

    Attributes:
        accepted: The first so many drafts are what dense decoding chooses.
        logits: Per accepted draft the dense logits, where an instrument wants them.
        choice: The token behind the accepted drafts, drawn from dense logits; None when every
            draft stands and no further token was asked for.
    """

    accepted: int
    logits: tuple[Tensor, ...]
    choice: Choice | None


class Steps:
    """See the module text.

    Args:
        block_tokens: Most tokens of one block.
        selector: Fills the memory; unused in mode dense.
        monitor: The boundary detectors; unused in mode dense.
        settings: The policy's numbers.

    Attributes:
        chooser: Chooses tokens; whoever decodes sets it.
        draft_chooser: Chooses tokens of fast steps; the same unless they are drafts.
        watch: Says which tokens may be chosen; whoever decodes sets it.
        instruments: Who looks on.
    """

    def __init__(
        self,
        block_tokens: int,
        chooser: TokenChooser,
        selector: Selector,
        monitor: BoundaryMonitor,
        settings: StepSettings,
    ) -> None:
        self.block_tokens = block_tokens
        self.chooser = self.draft_chooser = chooser
        self.selector = selector
        self.monitor = monitor
        self.settings = settings
        self.watch = UNWATCHED
        self.instruments = Instruments()

    def prefill(
        self, state: DecodingState, limits: DecodeLimits, segment_capacity: int
    ) -> Moves[Choice | None]:
        """Process everything unprocessed densely and draw; None when cancelled on the way."""
        sequence, prompt = state.sequence, state.prompt_tokens
        state.processed_ahead = 0
        rows = min(self.settings.prefill_evidence_queries, prompt) if self.settings.sparse else 0
        if sequence.layout is not None:
            sequence.layout.prompt_end = len(state.ids)
        outcome = yield DenseStep(
            sequence,
            state.unprocessed,
            self._drawing(len(state.ids)),
            evidence_rows=rows,
            refresh=self._order(segment_capacity) if sequence.layout is not None else None,
            interrupted=limits.cancelled,
        )
        if not outcome.choices:
            return None
        self._note_refresh(state, outcome)
        if sequence.layout is not None:
            self.monitor.reset(state.ids[-prompt:])
        return outcome.choice

    def dense(self, state: DecodingState, *, may_continue: bool) -> Moves[Choice]:
        """Process the pending token of mode dense and draw (`may_continue`: see `DenseStep`)."""
        drawing = self._drawing(len(state.ids))
        outcome = yield DenseStep(
            state.sequence, state.unprocessed, drawing, may_continue=may_continue
        )
        return outcome.choice

    def fast(
        self, state: DecodingState, token_id: int, position: int, *, may_continue: bool
    ) -> Moves[tuple[Choice, Boundary | None]]:
        """Process a token over the memory, draw, and ask the detectors about the step.

        Args:
            state: Its memory is ready.
            token_id: The token to process.
            position: Its absolute position.
            may_continue: See `FastStep`.
        """
        outcome = yield FastStep(
            state.sequence,
            token_id,
            self._drawing(position + 1, self.draft_chooser),
            measure_mass=self.monitor.needs_mass,
            on_fast_attention=self.instruments.on_fast_attention,
            may_continue=may_continue,
        )
        drawn = outcome.choice
        event = StepEvent(position, drawn.entropy_nats, drawn.selected_mass)
        return drawn, self.monitor.after_step(event)

    def slow(self, state: DecodingState, segment_capacity: int) -> Moves[Choice]:
        """Process the pending token densely, refresh from what it attended to, and draw.

        Under observe the segment's keys and values go into the history as they are; under rectify
        its tokens are processed again in the same pass.
        """
        observe = self.settings.slow_step == "observe"
        if not observe:
            state.sequence.drop_segment()
        outcome = yield DenseStep(
            state.sequence,
            state.unprocessed,
            self._drawing(len(state.ids)),
            evidence_rows=self.settings.evidence_queries,
            refresh=self._order(segment_capacity),
            flush_segment=observe,
        )
        self._note_refresh(state, outcome)
        return outcome.choice

    def verify(
        self,
        state: DecodingState,
        drafts: Sequence[int],
        allowed: Sequence[Tensor | None],
        segment_capacity: int,
        *,
        closing: bool,
    ) -> Moves[Verdict]:
        """Process pending token and drafts densely and keep what dense decoding agrees with.

        The history then ends with the last token that stands, and the memory is refreshed from
        the queries there.

        Args:
            state: Its ids end with the pending token; drafts are not among them.
            drafts: Tokens drawn from fast steps, in order.
            allowed: For each draft what it was drawn from (see `TokenWatch.allowed`), and, unless
                `closing`, the same for the token behind them.
            segment_capacity: See `RefreshOrder`.
            closing: Whether the drafts end the decoding if they stand: the last one is then not
                processed, and no token is drawn behind it.
        """
        sequence = state.sequence
        sequence.drop_segment()
        block = [*state.unprocessed, *(drafts[:-1] if closing else drafts)]
        start, first = sequence.processed_tokens, len(state.ids)
        standing, kept_logits = 0, []
        size = self.block_tokens
        choices: tuple[Choice, ...] = ()
        for low in range(0, len(block), size):
            drawing = self._drawing(first + low, allowed=allowed[low : low + size])
            outcome = yield BlockStep(sequence, block[low : low + size], drawing, low > 0)
            choices = outcome.choices
            for choice, draft in zip(choices, drafts[low : low + size], strict=False):
                if choice.token_id != draft:
                    break
                standing += 1
                if choice.logits is not None:
                    kept_logits.append(choice.logits)
            if standing < min(low + len(choices), len(drafts)):
                break
        ended = closing and standing == len(drafts)
        kept = standing if ended else standing + 1
        sequence.cut(start + kept)
        if ended:
            return Verdict(standing, tuple(kept_logits), None)
        # Evidence comes from the last rows that stand, not from what was rejected.
        rows = max(0, kept - self.settings.evidence_queries), kept
        outcome = yield RefreshStep(sequence, *rows, self._order(segment_capacity))
        self._note_refresh(state, outcome)
        return Verdict(standing, tuple(kept_logits), choices[standing - low])

    def close(self, state: DecodingState, *, drafting: bool) -> None:
        """Bring ids and keys into the state between decodings, whatever happened.

        Args:
            state: May have an open segment.
            drafting: Whether its tokens are drafts.
        """
        sequence = state.sequence
        if self.settings.slow_step == "observe" and not drafting:
            sequence.flush_segment()
        else:
            sequence.drop_segment()
        if sequence.processed_tokens >= len(state.ids):
            # Also when a plugin raised between a step and the draw from it, and when drafts were
            # processed of which the caller wanted no more: the last id is pending.
            sequence.cut(len(state.ids) - 1)

    def _order(self, segment_capacity: int) -> RefreshOrder:
        shown = self.instruments.on_refresh is not None
        return RefreshOrder(self.selector, segment_capacity, with_selections=shown)

    def _note_refresh(self, state: DecodingState, outcome: StepOutcome) -> None:
        if self.instruments.on_refresh is not None and outcome.selections is not None:
            self.instruments.on_refresh(state.sequence.processed_tokens, outcome.selections)

    def _drawing(
        self,
        position: int,
        chooser: TokenChooser | None = None,
        allowed: Sequence[Tensor | None] | None = None,
    ) -> Drawing:
        chosen = chooser or self.chooser
        masks = (self.watch.allowed(),) if allowed is None else tuple(allowed)
        if any(mask is not None for mask in masks):
            chosen = AllowedTokens(chosen, position, masks)
        return Drawing(
            chosen,
            position,
            with_entropy=self.monitor.needs_entropy,
            with_logits=self.instruments.on_logits is not None,
        )
