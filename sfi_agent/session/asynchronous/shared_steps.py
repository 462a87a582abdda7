"""Steps that several sessions share, so that what one of them raises ends that session alone.

A pass over the weights serves a row of each session, and a failure does not say whose row it was.
So every row is taken back to where it was and stepped on its own: the guilty one fails again, with
an error and a traceback of its own, and the others go on as if nothing had been. The same for what
fits the device row by row and not all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from sfi_agent.engine.requests import BlockStep, FastStep, RefreshStep, StepOutcome, StepRequest
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.log import log_event

__all__ = ["StepResult", "execute_shared", "may_share"]

StepResult: TypeAlias = StepOutcome | BaseException
"""What a step gave, or what it raised."""


def may_share(request: StepRequest) -> bool:
    """Whether a step can be taken back and repeated, and runs no code from elsewhere."""
    if isinstance(request, FastStep):
        return request.on_fast_attention is None
    if isinstance(request, BlockStep):
        return not request.continues
    return not (isinstance(request, RefreshStep) and request.order.with_selections)


def execute_shared(
    runner: Runner, requests: Sequence[StepRequest], batch: int, waiting: int
) -> list[StepResult]:
    """Execute requests together, and one by one where that fails.

    Args:
        runner: Executes them.
        requests: At least one, each of another sequence; several of them may share (`may_share`).
        batch: See `Runner.execute`.
        waiting: See `Runner.execute`.

    Returns:
        One result per request. Sequences whose steps raised are between two steps.
    """
    if len(requests) == 1:
        return [_result(runner, requests[0], batch, waiting)]
    before = [request.sequence.processed_tokens for request in requests]
    try:
        return [*runner.execute(requests, batch, waiting)]
    except BaseException as error:
        reason = _described(error)
    # Out of the handler: the error's frames hold what the pass had on the device.
    log_event("warning", "shared_step_failed", sessions=len(requests), reason=reason)
    waiting += len(requests) - 1
    return [
        _repeated(runner, request, processed, batch, waiting)
        for request, processed in zip(requests, before, strict=True)
    ]


def _repeated(
    runner: Runner, request: StepRequest, processed_tokens: int, batch: int, waiting: int
) -> StepResult:
    """A step on its own behind a shared one that failed, perhaps when this row was done."""
    try:
        if isinstance(request, RefreshStep) and _is_refreshed(request):
            return StepOutcome()
        _take_back(request, processed_tokens)
    except BaseException as error:
        return error
    return _result(runner, request, batch, waiting)


def _take_back(request: StepRequest, processed_tokens: int) -> None:
    """Forget the tokens of a step, if it has come so far. What it flushed before is final."""
    sequence = request.sequence
    if sequence.processed_tokens == processed_tokens:
        return
    if isinstance(request, FastStep):
        sequence.discard_fast_token()
    else:
        sequence.cut(processed_tokens)


def _is_refreshed(request: RefreshStep) -> bool:
    """Whether the memory is filled: the block before has said that it was not."""
    layout = request.sequence.layout
    return layout is not None and layout.ready


def _result(runner: Runner, request: StepRequest, batch: int, waiting: int) -> StepResult:
    try:
        return runner.execute([request], batch, waiting)[0]
    except BaseException as error:
        return error


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
