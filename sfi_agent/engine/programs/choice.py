"""Programs where they can run, eager steps with a reason where they cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from sfi_agent.engine.programs.cohort_programs import ProgramNotMade, ProgramOptions
from sfi_agent.engine.programs.executor import ProgramSteps
from sfi_agent.engine.requests import StepOutcome, StepRequest
from sfi_agent.engine.sequence import SequenceState
from sfi_agent.errors import SfiError
from sfi_agent.observe.log import log_event

if TYPE_CHECKING:
    from sfi_agent.engine.eager import EagerSteps
    from sfi_agent.engine.runner import Runner

__all__ = ["Execution", "ProgramChoice", "make_programs"]

Execution: TypeAlias = Literal["auto", "eager", "uncaptured"]

_EXPECTED = frozenset({"a prefill", "an empty history"})
"""Not worth a word: nobody waits for a program there."""


class ProgramChoice:
    """Programs with eager steps to fall back to.

    Args:
        runner: Whose model is stepped.
        capture: Whether programs become CUDA graphs.

    Attributes:
        least_capacity_tokens: See `Seats`.
        on_progress: Told what is compiled and captured.
        problem: Why something could not be compiled or captured; "" while nothing went wrong.
    """

    def __init__(self, runner: Runner, capture: bool) -> None:
        self._runner = runner
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle() if capture else None
        self._backend: Callable[..., Any] | None = None
        self._said: set[str] = set()
        self.least_capacity_tokens = 0
        self.problem = ""
        self.on_progress: Callable[[str], None] = lambda _: None
        self._steps: ProgramSteps | None = self._make()

    @property
    def bytes(self) -> int:
        """Of what programs keep besides histories and memories."""
        return self._steps.seats.bytes if self._steps is not None else 0

    @property
    def compiles(self) -> bool:
        """Whether steps that run as programs are compiled."""
        return self._backend is not None and self.captures

    @property
    def captures(self) -> bool:
        """Whether steps have been captured as CUDA graphs."""
        return self._capture and self._steps is not None and self._steps.seats.any_made

    @property
    def reason(self) -> str:
        """Why something was not compiled or captured; "" where nothing was left out so far."""
        return self.problem or ("" if self.captures else "; ".join(sorted(self._said)))

    def compile_with(self, backend: Callable[..., Any] | None) -> None:
        """Compile the model's modules in programs made from now on; those there are dropped."""
        if backend is not self._backend:
            self._backend = backend
            self._start_anew(self._make())

    def execute(
        self, requests: Sequence[StepRequest], batch: int, waiting: int, eager: EagerSteps
    ) -> list[StepOutcome]:
        """See `Runner.execute`."""
        steps = self._steps
        if steps is None:
            return eager.execute(requests)
        steps.seats.least_capacity_tokens = self.least_capacity_tokens
        problems = [steps.problem(request) for request in requests]
        by_program = [r for r, problem in zip(requests, problems, strict=True) if problem is None]
        eagerly = [r for r, problem in zip(requests, problems, strict=True) if problem is not None]
        for request, problem in zip(requests, problems, strict=True):
            if problem is not None:
                self._say(problem)
                steps.forget(request.sequence)
        done = iter(
            self._by_program(steps, by_program, batch, waiting, eager) if by_program else []
        )
        done_eagerly = iter(eager.execute(eagerly) if eagerly else [])
        return [next(done if problem is None else done_eagerly) for problem in problems]

    def _by_program(
        self,
        steps: ProgramSteps,
        requests: Sequence[StepRequest],
        batch: int,
        waiting: int,
        eager: EagerSteps,
    ) -> list[StepOutcome]:
        try:
            return steps.execute(requests, batch, waiting)
        except (SfiError, torch.OutOfMemoryError):
            raise
        except ProgramNotMade as error:
            cause = error.__cause__ or error
            self.problem = f"{type(cause).__name__}: {cause}"
            compiled = self._backend is not None
            log_event("warning", "programs_unavailable", compiled=compiled, reason=self.problem)
            # Without compilation it may still be captured.
            self._backend = None
            self._start_anew(self._make() if compiled else None)
            left = [r for r, done in zip(requests, error.outcomes, strict=True) if done is None]
            outcomes = iter(self.execute(left, batch, waiting, eager))
            return [next(outcomes) if done is None else done for done in error.outcomes]

    def forget(self, sequence: SequenceState) -> None:
        """This sequence is processed by somebody else."""
        if self._steps is not None:
            self._steps.forget(sequence)

    def _start_anew(self, steps: ProgramSteps | None) -> None:
        """Step with these programs, or with none; sequences take along what the others keep."""
        if self._steps is not None:
            self._steps.forget_all()
        self._steps = steps

    def _say(self, problem: str) -> None:
        if problem not in self._said and problem not in _EXPECTED:
            self._said.add(problem)
            log_event("info", "eager_step", reason=problem)

    def _make(self) -> ProgramSteps:
        runner = self._runner
        config = runner.model.config.get_text_config()
        options = ProgramOptions(
            capture=self._capture,
            compile_backend=self._backend,
            pool=self._pool,
            position_limit=runner.shape.context_limit_tokens,
            on_progress=lambda text: self.on_progress(text),
        )
        heads = int(config.num_attention_heads)
        return ProgramSteps(runner.model, heads, runner.shape.device, options)


def make_programs(runner: Runner, execution: Execution) -> ProgramChoice | None:
    """Programs where they are wanted and possible; None leaves everything eager."""
    on_cuda = runner.shape.device.type == "cuda"
    if execution == "eager" or runner.check_numbers or (execution == "auto" and not on_cuda):
        return None
    return ProgramChoice(runner, capture=execution == "auto")
