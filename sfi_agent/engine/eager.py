"""Execution of requests by plain forward passes: any device, any plugin, any instrument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfi_agent.engine.drawing import draw_each, draw_rows
from sfi_agent.engine.refresh import refresh_memory
from sfi_agent.engine.requests import (
    BlockStep,
    DenseStep,
    FastStep,
    RefreshOrder,
    RefreshStep,
    StepOutcome,
    StepRequest,
)
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.streamed_refresh import PassSelections, refresh_streamed, select_again
from sfi_agent.protocols import Selection

if TYPE_CHECKING:
    from sfi_agent.engine.attention import StepContext
    from sfi_agent.engine.runner import Runner, StepOutput

__all__ = ["EagerSteps"]


class EagerSteps:
    """See the module text.

    Args:
        runner: Runs the forward passes.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @torch.no_grad()
    def execute(self, requests: Sequence[StepRequest]) -> list[StepOutcome]:
        """See `Runner.execute`."""
        outcomes: list[StepOutcome | None] = [None] * len(requests)
        together = {
            index: request
            for index, request in enumerate(requests)
            if isinstance(request, (DenseStep, FastStep)) and is_single(request)
        }
        if len(together) > 1:
            done = self._singles(list(together.values()))
            for index, outcome in zip(together, done, strict=True):
                outcomes[index] = outcome
        for index, request in enumerate(requests):
            if outcomes[index] is None:
                outcomes[index] = self._one(request)
        return [outcome for outcome in outcomes if outcome is not None]

    def _one(self, request: StepRequest) -> StepOutcome:
        if isinstance(request, DenseStep):
            return self._dense(request)
        if isinstance(request, FastStep):
            return self._fast(request)
        if isinstance(request, BlockStep):
            return self._block(request)
        return self._refresh_from_rows(request)

    def _dense(self, request: DenseStep) -> StepOutcome:
        if request.flush_segment:
            request.sequence.flush_segment()
        output = self._runner.dense(
            request.sequence,
            request.ids,
            evidence_rows=request.evidence_rows,
            selector=request.refresh.selector if request.refresh is not None else None,
            interrupted=request.interrupted,
        )
        if output is None:
            return StepOutcome()
        return self._finished([request], [output])[0]

    def _fast(self, request: FastStep) -> StepOutcome:
        output = self._runner.fast(
            request.sequence,
            request.token_id,
            measure_mass=request.measure_mass,
            on_fast_attention=request.on_fast_attention,
        )
        return self._finished([request], [output])[0]

    def _singles(self, requests: Sequence[DenseStep | FastStep]) -> list[StepOutcome]:
        """One token of each of several sequences, slow rows and fast rows in one pass."""
        contexts: list[StepContext] = []
        for request in requests:
            if isinstance(request, FastStep):
                context = self._runner.context("fast", request.sequence)
                context.measure_mass = request.measure_mass
                context.on_fast_attention = request.on_fast_attention
            else:
                if request.flush_segment:
                    request.sequence.flush_segment()
                context = self._runner.context("dense", request.sequence, request.evidence_rows)
                if request.refresh is not None and request.evidence_rows:
                    context.select_within(request.refresh.selector, 1)
            contexts.append(context)
        outputs = self._runner.single(contexts, [token_of(request) for request in requests])
        return self._finished(requests, outputs)

    def _finished(
        self, requests: Sequence[DenseStep | FastStep], outputs: Sequence[StepOutput]
    ) -> list[StepOutcome]:
        """Refresh where that was asked for, and draw."""
        selections = [
            self._refresh(request.sequence, request.refresh, output.selections)
            if isinstance(request, DenseStep) and request.refresh is not None
            else None
            for request, output in zip(requests, outputs, strict=True)
        ]
        choices = draw_each(
            torch.stack([output.logits for output in outputs]),
            [request.drawing for request in requests],
            [output.selected_mass for output in outputs],
        )
        return [
            StepOutcome((choice,), found) for choice, found in zip(choices, selections, strict=True)
        ]

    def _block(self, request: BlockStep) -> StepOutcome:
        layers = request.sequence.layers
        earlier = [layer.captured_query if request.continues else None for layer in layers]
        logits = self._runner.block(request.sequence, request.ids)
        for layer, before in zip(layers, earlier, strict=True):
            if before is not None and layer.captured_query is not None:
                layer.captured_query = torch.cat([before, layer.captured_query], dim=1)
        return StepOutcome(tuple(draw_rows(logits, request.drawing)))

    def _refresh_from_rows(self, request: RefreshStep) -> StepOutcome:
        layers = request.sequence.layers
        kept = [layer.captured_query for layer in layers]
        try:
            for layer in layers:
                if layer.captured_query is not None:
                    rows: Tensor = layer.captured_query[:, request.first_row : request.stop_row]
                    layer.captured_query = rows
            return StepOutcome(selections=self._refresh(request.sequence, request.order))
        except BaseException:
            # Nobody can compute them again: whoever repeats the step needs them.
            for layer, queries in zip(layers, kept, strict=True):
                layer.captured_query = queries
            raise

    def _refresh(
        self, sequence: SequenceState, order: RefreshOrder, chosen: PassSelections | None = None
    ) -> list[Selection | None]:
        """Refresh a memory, from what was chosen within the step if something was."""
        if not sequence.streamed:
            return refresh_memory(sequence, order.selector, order.segment_capacity)
        host = self._runner.host
        if chosen is None:
            chosen = select_again(sequence, order.selector, host.stream)
        return refresh_streamed(sequence, chosen, order.segment_capacity, host.gather)


def is_single(request: StepRequest) -> bool:
    """Whether a request processes one token, so that it can share a pass with others."""
    if isinstance(request, DenseStep):
        return len(request.ids) == 1 and request.interrupted is None
    return isinstance(request, FastStep)


def token_of(request: DenseStep | FastStep) -> int:
    """The token that a single request processes."""
    return request.token_id if isinstance(request, FastStep) else request.ids[0]
