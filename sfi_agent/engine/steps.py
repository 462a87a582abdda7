"""The steps of a policy on one sequence: prefill, dense, fast, slow, verifying.

Each runs the model, draws from what came out, and leaves the sequence ready for the next. Which
step comes when is the decoder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfi_agent.engine.boundaries import BoundaryMonitor
from sfi_agent.engine.decoding_state import Choice, DecodeLimits, DecodingState, StepSettings
from sfi_agent.engine.instruments import Instruments
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.runner import Runner
from sfi_agent.engine.sampling import TokenChooser, entropy_nats
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
        runner: Executes forward passes.
        selector: Fills the memory; unused in mode dense.
        monitor: The boundary detectors; unused in mode dense.
        settings: The policy's numbers.

    Attributes:
        chooser: Chooses tokens; whoever decodes sets it.
        draft_chooser: Chooses tokens of fast steps; the same unless they are drafts.
        instruments: Who looks on.
    """

    def __init__(
        self,
        runner: Runner,
        chooser: TokenChooser,
        selector: Selector,
        monitor: BoundaryMonitor,
        settings: StepSettings,
    ) -> None:
        self.runner = runner
        self.chooser = self.draft_chooser = chooser
        self.selector = selector
        self.monitor = monitor
        self.settings = settings
        self.instruments = Instruments()

    def prefill(
        self, state: DecodingState, limits: DecodeLimits, segment_capacity: int
    ) -> Choice | None:
        """Process everything unprocessed densely and draw; None when cancelled on the way."""
        sparse, prompt = self.settings.sparse, state.prompt_tokens
        rows = min(self.settings.prefill_evidence_queries, prompt) if sparse else 0
        output = self.runner.dense(
            state.sequence, state.unprocessed, evidence_rows=rows, interrupted=limits.cancelled
        )
        if output is None:
            return None
        if state.sequence.layout is not None:
            state.sequence.layout.prompt_end = state.sequence.processed_tokens
            self._refresh(state, segment_capacity)
            self.monitor.reset(state.ids[-prompt:])
        return self._draw(output.logits, len(state.ids))

    def dense(self, state: DecodingState) -> Choice:
        """Process the pending token of mode dense and draw."""
        output = self.runner.dense(state.sequence, state.unprocessed)
        assert output is not None
        return self._draw(output.logits, len(state.ids))

    def fast(
        self, state: DecodingState, token_id: int, position: int
    ) -> tuple[Choice, Boundary | None]:
        """Process a token over the memory, draw, and ask the detectors about the step.

        Args:
            state: Its memory is ready.
            token_id: The token to process.
            position: Its absolute position.
        """
        output = self.runner.fast(
            state.sequence,
            token_id,
            measure_mass=self.monitor.needs_mass,
            on_fast_attention=self.instruments.on_fast_attention,
        )
        drawn = self._draw(
            output.logits, position + 1, output.selected_mass, chooser=self.draft_chooser
        )
        event = StepEvent(position, drawn.entropy_nats, drawn.selected_mass)
        return drawn, self.monitor.after_step(event)

    def slow(self, state: DecodingState, segment_capacity: int) -> Choice:
        """Process the pending token densely, refresh from what it attended to, and draw.

        Under observe the segment's keys and values go into the history as they are; under rectify
        its tokens are processed again in the same pass.
        """
        if self.settings.slow_step == "observe":
            state.sequence.flush_segment()
        else:
            state.sequence.drop_segment()
        output = self.runner.dense(
            state.sequence, state.unprocessed, evidence_rows=self.settings.evidence_queries
        )
        assert output is not None
        self._refresh(state, segment_capacity)
        return self._draw(output.logits, len(state.ids))

    def verify(
        self, state: DecodingState, drafts: Sequence[int], segment_capacity: int, *, closing: bool
    ) -> Verdict:
        """Process pending token and drafts densely and keep what dense decoding agrees with.

        The history then ends with the last token that stands, and the memory is refreshed from
        the queries there.

        Args:
            state: Its ids end with the pending token; drafts are not among them.
            drafts: Tokens drawn from fast steps, in order.
            segment_capacity: See `refresh_memory`.
            closing: Whether the drafts end the decoding if they stand: the last one is then not
                processed, and no token is drawn behind it.
        """
        sequence = state.sequence
        sequence.drop_segment()
        block = [*state.unprocessed, *(drafts[:-1] if closing else drafts)]
        start, first = sequence.processed_tokens, len(state.ids)
        standing, kept_logits = 0, []
        size = self.runner.prefill_chunk_tokens
        queries: Sequence[Tensor | None] = [None] * len(sequence.layers)
        for low in range(0, len(block), size):
            logits = self.runner.block(sequence, block[low : low + size])
            queries = self._join_rows(state, queries)
            choices = self._draw_rows(logits, first + low)
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
        self._keep_rows(state, kept, low + len(choices))
        sequence.cut(start + kept)
        if ended:
            return Verdict(standing, tuple(kept_logits), None)
        self._refresh(state, segment_capacity)
        return Verdict(standing, tuple(kept_logits), choices[standing - low])

    def close(self, state: DecodingState) -> None:
        """Bring ids and keys into the state between decodings, whatever happened."""
        sequence = state.sequence
        if self.settings.slow_step == "observe":
            sequence.flush_segment()
        else:
            sequence.drop_segment()
        if sequence.processed_tokens >= len(state.ids):
            # Also when a plugin raised between a step and the draw from it, and when drafts were
            # processed of which the caller wanted no more: the last id is pending.
            sequence.cut(len(state.ids) - 1)

    @staticmethod
    def _join_rows(
        state: DecodingState, earlier: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Put the queries of a chunk behind those of the chunks before it, per layer."""
        for layer, before in zip(state.sequence.layers, earlier, strict=True):
            if before is not None and layer.captured_query is not None:
                layer.captured_query = torch.cat([before, layer.captured_query], dim=1)
        return [layer.captured_query for layer in state.sequence.layers]

    def _keep_rows(self, state: DecodingState, kept: int, rows: int) -> None:
        """Evidence comes from the last rows that stand, not from what was rejected."""
        first = max(0, kept - self.settings.evidence_queries)
        for layer in state.sequence.layers:
            if layer.captured_query is not None:
                assert layer.captured_query.shape[1] == rows
                layer.captured_query = layer.captured_query[:, first:kept]

    @torch.no_grad()
    def _refresh(self, state: DecodingState, segment_capacity: int) -> None:
        selections = refresh_memory(state.sequence, self.selector, segment_capacity)
        if self.instruments.on_refresh is not None:
            self.instruments.on_refresh(state.sequence.processed_tokens, selections)

    def _draw(
        self,
        logits: Tensor,
        position: int,
        selected_mass: Tensor | None = None,
        chooser: TokenChooser | None = None,
    ) -> Choice:
        """Draw on the device and read token, entropy and mass in one transfer."""
        numbers = [(chooser or self.chooser).choose(logits, position).double()]
        if self.monitor.needs_entropy:
            numbers.append(entropy_nats(logits).double())
        if selected_mass is not None:
            numbers.append(selected_mass.double())
        token, *rest = torch.stack(numbers).tolist()
        entropy = rest.pop(0) if self.monitor.needs_entropy else None
        mass = rest.pop(0) if rest else None
        return Choice(int(token), entropy, mass, self._wanted(logits))

    def _draw_rows(self, logits: Tensor, first_position: int) -> list[Choice]:
        """What dense decoding chooses after each row of `logits` `[rows, vocabulary]`."""
        tokens = torch.stack(
            [self.chooser.choose(row, first_position + index) for index, row in enumerate(logits)]
        ).tolist()
        entropies: list[float | None] = [None] * len(tokens)
        if self.monitor.needs_entropy:
            entropies = entropy_nats(logits).tolist()
        return [
            Choice(token, entropy, None, self._wanted(row))
            for token, entropy, row in zip(tokens, entropies, logits, strict=True)
        ]

    def _wanted(self, logits: Tensor) -> Tensor | None:
        return logits if self.instruments.on_logits is not None else None
