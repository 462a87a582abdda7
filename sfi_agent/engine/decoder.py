"""The decoding state machine: prefill, then slow and fast steps until a stop.

    dense prefill of everything unprocessed, refresh
      -> choose a token -> detectors see it -> kind of the next step
           slow: close the segment, dense step, refresh
           fast: step over the memory -> detectors see the step
                   "now": discard it, run the same token densely, refresh (a retry)

Under verify, and where tokens must be exact, those of fast steps are drafts: see
`engine/drafting.py`. Every decoding starts with a dense prefill of at least the pending token, so
no selection outlives a turn. Ids and keys stay consistent when a step raises or the caller stops
listening.

The machine itself, `engine/decoding.py`, is a generator that yields requests and records:
`Decoder.decode` executes the requests of one sequence, `engine/batch.py` those of many together.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.decoding import Decoding
from sfi_agent.engine.decoding_state import DecodeLimits, DecodingState, StepSettings
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.requests import DecodeMoves, StepOutcome
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sampling import Sampler, TokenChooser
from sfi_agent.engine.steps import Steps
from sfi_agent.observe.trace import StepRecord
from sfi_agent.protocols import Selector

__all__ = ["DecodeMoves", "Decoder"]


class Decoder:
    """Decodes one sequence under one policy.

    Args:
        runner: Executes forward passes.
        sampler: Chooses tokens.
        selector: Fills the memory; unused in mode dense.
        monitor: The boundary detectors; unused in mode dense.
        settings: See `StepSettings`.
        draft_chooser: Chooses drafts; None is the sampler. A measurement that says which drafts
            stand gives both.
        chooser: Chooses everything else that is not given; None is the sampler.
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        selector: Selector,
        monitor: BoundaryMonitor,
        settings: StepSettings,
        *,
        draft_chooser: TokenChooser | None = None,
        chooser: TokenChooser | None = None,
    ) -> None:
        self.runner = runner
        self.steps = Steps(runner.prefill_chunk_tokens, sampler, selector, monitor, settings)
        self._sampler = sampler
        self._draft_chooser = draft_chooser
        self._chooser = chooser
        self._settings = settings

    def attach(self, instruments: Instruments) -> None:
        """Let these functions look on from now on, in place of earlier ones."""
        self.steps.instruments = instruments

    def decode(self, state: DecodingState, limits: DecodeLimits) -> Iterator[StepRecord]:
        """Process what is unprocessed, then choose tokens until a limit.

        Args:
            state: Has at least one unprocessed id; changed as tokens are chosen. Between two
                yields ids are consistent, and when the iterator is closed keys are too.
            limits: When to end.

        Yields:
            One record per chosen token, already appended to `state.ids`.
        """
        moves = self.moves(state, limits)
        outcome: StepOutcome | None = None
        try:
            while True:
                move = moves.send(outcome)
                if isinstance(move, StepRecord):
                    outcome = None
                    yield move
                else:
                    outcome = self.runner.execute([move])[0]
        except StopIteration:
            return
        finally:
            moves.close()

    def moves(self, state: DecodingState, limits: DecodeLimits) -> DecodeMoves:
        """The same decoding for somebody who executes its requests.

        Whatever ends it, `close()` on the generator brings ids and keys into their state between
        decodings.
        """
        choosers = (self._draft_chooser or self._sampler, self._chooser or self._sampler)
        decoding = Decoding(self.steps, self._settings, self._sampler, state, limits, choosers)
        return decoding.moves()

    def next_logits(self, state: DecodingState) -> Tensor:
        """Float32 `[vocabulary]` of the token after the last id; the state is left as it was."""
        sequence, todo = state.sequence, state.unprocessed
        before = sequence.processed_tokens
        try:
            return self.runner.process(sequence, todo).logits
        finally:
            sequence.cut(before)
