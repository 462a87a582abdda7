"""Runs forward passes of a model over sequences, and executes what decodings ask for.

`Runner.execute` is the seam: decodings hand over requests and get outcomes. Where steps can be
compiled and captured (`engine/programs/`), it hands single tokens and blocks to programs; the rest,
and everything where programs cannot run, is executed eagerly by the forward passes below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sfi_agent.engine.attention import BatchContext, StepContext, streamed_histories
from sfi_agent.engine.attention_checks import check_logits
from sfi_agent.engine.eager import EagerSteps
from sfi_agent.engine.host_access import HostAccess
from sfi_agent.engine.instruments import FastAttention
from sfi_agent.engine.memory_parts import typed_memory_errors
from sfi_agent.engine.model_shape import ModelShape
from sfi_agent.engine.programs.choice import Execution, make_programs
from sfi_agent.engine.requests import StepOutcome, StepRequest
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.engine.step_output import StepOutput
from sfi_agent.engine.surroundings import own_surroundings
from sfi_agent.engine.turn_lock import TurnLock
from sfi_agent.protocols import Selector

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = ["Runner", "StepOutput"]

_PREFILL_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}
"""Bounds the activations of a prefill; larger chunks keep a GPU busier."""


class Runner:
    """Eager execution of steps; the model's attention must be switched to ours.

    Args:
        model: A causal language model of transformers, in eval mode.
        shape: From `inspect_model`.
        prefill_chunk_tokens: Tokens per prefill pass; None chooses by device.
        check_numbers: Whether numbers that are not finite raise `NumericsError`; every step is then
            executed eagerly.
        execution: "auto" takes captured steps on a CUDA device and eager ones elsewhere;
            "uncaptured" runs the programs of captured steps without capture, for tests.

    Attributes:
        host: Keeps histories in host memory and brings them to the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        prefill_chunk_tokens: int | None = None,
        *,
        check_numbers: bool = False,
        execution: Execution = "auto",
    ) -> None:
        self.model = model
        self.shape = shape
        default = _PREFILL_CHUNK_TOKENS.get(shape.device.type, 512)
        self.prefill_chunk_tokens = prefill_chunk_tokens or default
        self.check_numbers = check_numbers
        self.host = HostAccess.of(shape.device)
        self._eager = EagerSteps(self)
        self._lock = TurnLock()
        self.programs = make_programs(self, execution)

    def execute(
        self, requests: Sequence[StepRequest], batch: int = 1, waiting: int = 0
    ) -> list[StepOutcome]:
        """Execute requests of different sequences, single tokens in one forward pass.

        Args:
            requests: At least one, each of another sequence.
            batch: How many sequences are decoded together, those included that wait or have ended.
            waiting: How many of them wait for a later step.

        Returns:
            One outcome per request. When a step raises, every sequence stays between two steps.
        """
        with (
            self._lock,
            own_surroundings(self.shape.device),
            typed_memory_errors(self, [r.sequence for r in requests]),
        ):
            if self.programs is None:
                return self._eager.execute(requests)
            return self.programs.execute(requests, batch, waiting, self._eager)

    def process(self, sequence: SequenceState, ids: Sequence[int]) -> StepOutput:
        """Process tokens densely for somebody who asks outside of a decoding.

        Args:
            sequence: Its segment must have been flushed.
            ids: At least one token.
        """
        with self._lock, own_surroundings(self.shape.device), typed_memory_errors(self, [sequence]):
            if self.programs is not None:
                self.programs.forget(sequence)
            output = self.dense(sequence, ids)
        assert output is not None
        return output

    @contextmanager
    def exclusive(self, sequences: Sequence[SequenceState]) -> Iterator[None]:
        """No step is taken meanwhile; for those who move what steps read.

        Args:
            sequences: Named where the device runs out of memory.
        """
        with self._lock, own_surroundings(self.shape.device), typed_memory_errors(self, sequences):
            yield

    def dense(
        self,
        sequence: SequenceState,
        ids: Sequence[int],
        *,
        evidence_rows: int = 0,
        selector: Selector | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> StepOutput | None:
        """Process tokens densely, in chunks, appending to every layer's history.

        Args:
            sequence: Its segment must have been flushed.
            ids: At least one token.
            evidence_rows: How many of the newest queries to keep for a refresh; the last chunk
                holds at least so many, where there are so many.
            selector: Of the refresh that follows, if one does.
            interrupted: Asked between chunks; true ends the pass early.

        Returns:
            The output after the last token, or None when interrupted (whole chunks stay
            processed).
        """
        output = None
        sequence.expect(len(ids))
        chunks = _chunks(len(ids), self.prefill_chunk_tokens, evidence_rows)
        for start, end in chunks:
            if interrupted is not None and interrupted():
                return None
            rows = evidence_rows if end == len(ids) else 0
            context = self.context("dense", sequence, min(rows, end - start))
            if rows and selector is not None:
                context.select_within(selector, end - start)
            output = self._forward(context, ids[start:end])
        assert output is not None
        return output

    def block(self, sequence: SequenceState, ids: Sequence[int]) -> Tensor:
        """Process a few tokens densely in one pass and keep what each of them tells.

        Args:
            sequence: Its segment must have been flushed or dropped.
            ids: At least one token; every query row is kept for a refresh.

        Returns:
            Logits `[tokens, vocabulary]` float32: row i is for the token after `ids[i]`.
        """
        context = self.context("dense", sequence, len(ids))
        return self._forward(context, ids, logit_rows=len(ids)).logits.view(len(ids), -1)

    def fast(
        self,
        sequence: SequenceState,
        token: Tensor | int,
        *,
        measure_mass: bool = False,
        on_fast_attention: Callable[[FastAttention], None] | None = None,
    ) -> StepOutput:
        """Process one token over the memory.

        Args:
            sequence: Its memory must be ready.
            token: The id, an int or a `[]` int64 tensor on the device.
            measure_mass: Whether to measure the attention mass on the selected tokens.
            on_fast_attention: See `Instruments`.
        """
        assert sequence.layout is not None and sequence.layout.ready
        context = self.context("fast", sequence)
        context.measure_mass, context.on_fast_attention = measure_mass, on_fast_attention
        if isinstance(token, int):
            # Filled on the device: copying a number there would make the host wait.
            token = torch.full((), token, dtype=torch.int64, device=self.shape.device)
        output = self._forward(context, token)
        sequence.layout.advance(1)
        return output

    def single(self, contexts: Sequence[StepContext], token_ids: Sequence[int]) -> list[StepOutput]:
        """Process one token of each of several sequences, fast or densely, in one pass.

        Args:
            contexts: The step of each sequence; memories of fast ones are ready.
            token_ids: One per sequence.
        """
        tokens = torch.as_tensor(token_ids, dtype=torch.int64, device=self.shape.device)
        sequences = [context.sequence for context in contexts]
        logits = self._logits(BatchContext(list(contexts)), sequences, tokens[:, None], 1)[:, -1]
        outputs = []
        for context, row in zip(contexts, logits, strict=True):
            layout = context.sequence.layout
            if context.kind == "fast" and layout is not None:
                layout.advance(1)
            outputs.append(StepOutput(row, _mean_mass(context), context.selections))
        return outputs

    def context(
        self, kind: Literal["dense", "fast"], sequence: SequenceState, rows: int = 0
    ) -> StepContext:
        """The step of one sequence, with the runner's checks."""
        return StepContext(
            kind, sequence, rows, check_numbers=self.check_numbers, stream=self.host.stream
        )

    def _forward(
        self, context: StepContext, ids: Sequence[int] | Tensor, logit_rows: int = 1
    ) -> StepOutput:
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.shape.device).view(1, -1)
        logits = self._logits(context, [context.sequence], tokens, logit_rows)[0]
        kept = logits if logit_rows > 1 else logits[-1]
        return StepOutput(kept, _mean_mass(context), context.selections)

    @torch.no_grad()
    def _logits(
        self,
        context: StepContext | BatchContext,
        sequences: Sequence[SequenceState],
        tokens: Tensor,
        logit_rows: int,
    ) -> Tensor:
        """One forward pass: tokens `[batch, rows]` to float32 `[batch, logit_rows, vocabulary]`."""
        rows = torch.arange(tokens.shape[1], device=self.shape.device)
        first = [sequence.processed_tokens for sequence in sequences]
        positions = torch.stack([rows + start for start in first])
        try:
            with self.host.stream.reading(streamed_histories(context)):
                # No cache and no mask: the attention function keeps the history and its own
                # causality.
                result = self.model(
                    input_ids=tokens,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=logit_rows,
                    sfi=context,
                )
            logits: Tensor = result.logits.float()
            if self.check_numbers:
                check_logits(logits, min(first))
        except BaseException:
            for sequence in sequences:
                sequence.settle()
            raise
        for sequence in sequences:
            sequence.processed_tokens += tokens.shape[1]
        return logits


def _mean_mass(context: StepContext) -> Tensor | None:
    return torch.stack(context.selected_mass).mean() if context.selected_mass else None


def _chunks(total: int, size: int, last_at_least: int) -> list[tuple[int, int]]:
    """Cut `total` tokens into chunks; the last one takes from its neighbours what it lacks."""
    assert total, "a dense pass needs at least one token"
    bounds = list(range(0, total, size))
    if total - bounds[-1] < last_at_least:
        last = max(0, total - last_at_least)
        bounds = [*(bound for bound in bounds if bound < last), last]
    return list(zip(bounds, [*bounds[1:], total], strict=True))
