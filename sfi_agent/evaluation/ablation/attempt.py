"""One attempt at a case: stores each policy's run as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfi_agent.evaluation.ablation.details import DetailRecorder
from sfi_agent.evaluation.ablation.policy import DENSE
from sfi_agent.evaluation.ablation.records import finished_run
from sfi_agent.evaluation.ablation.store import ResultsFolder, write_atomically
from sfi_agent.evaluation.ablation.stretches import run_stretches
from sfi_agent.evaluation.ablation.units import CaseKey, RunKey

if TYPE_CHECKING:
    from sfi_agent.evaluation.ablation.grid_sections import TraceSettings
    from sfi_agent.evaluation.play import CaseRun, TurnRun
    from sfi_agent.evaluation.tasks import Case, TokenCounter
    from sfi_agent.session.session import Session

__all__ = ["Attempt", "Job", "RunDone"]

RunDone = Callable[[RunKey, bool], None]
"""Told about every stored run, and whether it failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One case and the policies that are still to be played on it.

    Attributes:
        case: The case.
        policies: Names of the policies whose runs are missing, dense perhaps among them.
        detailed: Record traces of these runs; the runs themselves are stored already.
    """

    case: CaseKey
    policies: tuple[str, ...]
    detailed: bool = False


class Attempt:
    """Listens while a case is played, and stores what is finished.

    Args:
        job: What is played.
        waiting: Policies of the job without a run; those that finish are taken out.
        traces: How much of detailed runs is kept.
        folder: Where runs go.
        done: Told about every stored run.
        count_tokens: How the model's tokenizer counts.

    Attributes:
        job: The same.
        waiting: The same.
        case: The case, once it is made.
        handing_over: Whether a finished run is being stored and told about.
    """

    def __init__(
        self,
        job: Job,
        waiting: list[str],
        traces: TraceSettings,
        folder: ResultsFolder,
        done: RunDone,
        count_tokens: TokenCounter,
    ) -> None:
        self.job = job
        self.waiting = waiting
        self.case: Case | None = None
        self.handing_over = False
        self._traces = traces
        self._folder = folder
        self._done = done
        self._count_tokens = count_tokens
        self._playing: str | None = None
        self._reference: CaseRun | None = None
        self._recorders: dict[str, DetailRecorder] = {}

    @property
    def lost(self) -> list[str]:
        """The policies that an error takes with it: the one that was being played, or all where
        none was. Without the reference no policy can be compared."""
        playing = self._playing
        if playing is None or playing == DENSE or playing not in self.waiting:
            return list(self.waiting)
        return [playing]

    def begin(self, policy: str, session: Session) -> None:
        """A policy's session is there."""
        self._playing = policy
        if self.job.detailed and policy in self.waiting:
            self._recorders[policy] = DetailRecorder(session, self._traces)

    def note_turn(self, policy: str, index: int, turn: TurnRun) -> None:
        """An answer is there."""
        if index == 0 and policy in self._recorders:
            self._recorders[policy].note_first_turn(turn)

    def finish(self, run: CaseRun) -> None:
        """A policy is through; its run is stored before anything else happens."""
        if run.policy == DENSE:
            self._reference = run
        if run.policy not in self.waiting:
            return  # The reference, played again for the others.
        assert self.case is not None and self._reference is not None
        key = RunKey(self.job.case, run.policy)
        folder = self._folder
        if self.job.detailed:
            document = self._recorders[run.policy].document(key, self.case, run)
            path, indent = folder.trace_path(key), None
        else:
            stretches = run_stretches(self.case, run, self._count_tokens)
            document = finished_run(key, self.case, run, self._reference, stretches)
            path, indent = folder.run_path(key), 1
        self.handing_over = True
        write_atomically(path, document, indent=indent)
        if self.job.detailed:
            folder.failed_trace_path(key).unlink(missing_ok=True)
        self.waiting.remove(run.policy)
        self._done(key, False)
        self.handing_over = False
