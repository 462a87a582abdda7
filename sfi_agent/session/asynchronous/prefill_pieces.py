"""Prefills in pieces: between two chunks of a long input other sessions take their steps.

The pieces are the chunks that the runner would process in one go, so that nothing a session says
depends on who else is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

from sfi_agent.engine.requests import DenseStep, StepOutcome, StepRequest
from sfi_agent.engine.runner import Runner

__all__ = ["execute_alone", "is_prefill", "piece_tokens", "process_piece"]


def is_prefill(request: StepRequest) -> TypeGuard[DenseStep]:
    """Whether a request may be executed in pieces."""
    return isinstance(request, DenseStep) and request.interrupted is not None


def piece_tokens(tokens: int, chunk_tokens: int, evidence_rows: int) -> int:
    """Length of the next piece; 0 where what is left is executed whole.

    Args:
        tokens: Length of the input that is left.
        chunk_tokens: Longest chunk.
        evidence_rows: Least length of the last chunk, where there are so many.
    """
    left = tokens - chunk_tokens
    if left <= 0:
        return 0
    return chunk_tokens if left >= evidence_rows else max(0, tokens - evidence_rows)


def process_piece(runner: Runner, request: DenseStep) -> DenseStep | StepOutcome:
    """Execute the next piece of a prefill: what is left of it, or its outcome."""
    tokens = piece_tokens(len(request.ids), runner.prefill_chunk_tokens, request.evidence_rows)
    if not tokens:
        return runner.execute([request])[0]
    if request.interrupted is not None and request.interrupted():
        return StepOutcome()
    request.sequence.expect(len(request.ids))
    runner.process(request.sequence, request.ids[:tokens])
    return replace(request, ids=request.ids[tokens:])


def execute_alone(runner: Runner, request: StepRequest) -> StepOutcome:
    """Execute a request of one sequence, giving way to other threads between its pieces."""
    if not is_prefill(request):
        return runner.execute([request])[0]
    left: DenseStep | StepOutcome = request
    while isinstance(left, DenseStep):
        left = process_piece(runner, left)
    return left
