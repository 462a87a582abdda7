"""Runs a grid from its start or from where it was interrupted, and writes the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sfi_agent.config_files import to_yaml
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.ablation.grid import AblationGrid
from sfi_agent.evaluation.ablation.model_facts import plugin_origins, versions
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.progress import AblationProgress, OnProgress
from sfi_agent.evaluation.ablation.store import ResultsFolder, write_atomically
from sfi_agent.evaluation.ablation.summary import AblationResults, write_results
from sfi_agent.evaluation.ablation.this_process import ThisProcess
from sfi_agent.evaluation.ablation.units import RunKey
from sfi_agent.evaluation.ablation.worker_processes import WorkerProcesses

__all__ = ["run_ablation", "write_ablation_report"]

_GRID_FILE = "grid.yaml"


def run_ablation(
    grid: AblationGrid,
    folder: Path,
    *,
    workers: int = 1,
    retry_failed: bool = False,
    report: bool = True,
    command: str | None = None,
    on_progress: OnProgress | None = None,
) -> AblationResults:
    """Play every policy of a grid on every case, less what the folder holds already.

    Every run is stored when it is finished. On KeyboardInterrupt the results so far are summed
    up before it goes on to the caller; the same call later resumes.

    Args:
        grid: What to run.
        folder: Results folder: new, empty, or of the same ablation.
        workers: Processes, each with the model in its own memory. 1 plays in this process; with
            more, a program that calls this needs `if __name__ == "__main__":` around its start.
        retry_failed: Play runs again that failed before.
        report: Write `report.html` at the end.
        command: The command line, for the report.
        on_progress: Told how far it is.

    Raises:
        InputError: The folder belongs to another ablation or to something else, or another
            process is writing to it; `workers` is below 1; the checkpoint has no tokenizer.
        ConfigError: The grid does not fit the model.
        CheckpointError: The model cannot be loaded.
        UnsupportedModelError: The model cannot be decoded slow-fast.
    """
    if workers < 1:
        raise InputError(explain("ran an ablation", got=f"workers={workers!r}", allowed=">= 1"))
    results = ResultsFolder(folder)
    results.check_usable()
    plan, tell = Plan.of(grid), _Teller(on_progress)
    tell.stage("loading", grid.model)
    crew = ThisProcess(plan, results) if workers == 1 else WorkerProcesses(plan, results, workers)
    with closing(crew):
        model = crew.start()
        with results.opened(_fingerprint(plan, model)):
            write_atomically(folder / _GRID_FILE, to_yaml(grid.as_json()))
            sum_up = partial(write_results, plan, results, model, command=command, workers=workers)
            try:
                troubles = _play(plan, results, crew, tell, retry_failed)
            except BaseException:
                crew.close()
                sum_up()  # Without a word to the listener, whose error this may be.
                raise
            crew.close()
            tell.stage("writing", "results")
            found = sum_up(notes=tuple(troubles))
            return _with_report(found) if report else found


def write_ablation_report(folder: Path) -> AblationResults:
    """Sum the results of a folder up again, complete or not, and write its report; plays nothing.

    Raises:
        InputError: The folder holds no ablation, or is damaged.
        ConfigError: Its grid names a plugin that is not installed here.
    """
    results = ResultsFolder(folder)
    model = results.fingerprint()["model"]
    path = folder / _GRID_FILE
    if not path.is_file():
        raise InputError(
            explain(
                f"wrote the report of {folder}",
                got=f"a folder without {_GRID_FILE}",
                remedy="run its grid again with this folder as --out: it resumes",
            )
        )
    plan = Plan.of(AblationGrid.load(path))
    before = results.read_results()
    return _with_report(
        write_results(
            plan,
            results,
            model,
            command=before.get("command"),
            workers=before.get("workers", 1),
        )
    )


def _fingerprint(plan: Plan, model: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides results; the version of Python is no part of it."""
    return {
        **plan.as_fingerprint(),
        "model": dict(model),
        "versions": {name: found for name, found in versions().items() if name != "python"},
        "plugins": plugin_origins(policy.config for policy in plan.policies),
    }


def _with_report(found: AblationResults) -> AblationResults:
    from sfi_agent.evaluation.report import write_report

    return replace(found, report=write_report(found.folder))


def _play(
    plan: Plan,
    results: ResultsFolder,
    crew: ThisProcess | WorkerProcesses,
    tell: _Teller,
    retry_failed: bool,
) -> list[str]:
    jobs = plan.jobs(results, retry_failed=retry_failed)
    waiting = sum(len(job.policies) for job in jobs)
    tell.start(len(plan.runs), len(plan.runs) - waiting)
    troubles = crew.play(jobs, tell.run_done)
    details = plan.detail_jobs(results)
    tell.start(len(plan.traced), len(plan.traced) - sum(len(job.policies) for job in details))
    tell.stage("recording", "")
    return troubles + crew.play(details, tell.run_done)


@dataclass(slots=True)
class _Teller:
    """Counts, and passes the counts on."""

    listener: Callable[[AblationProgress], None] | None
    now: AblationProgress = AblationProgress("loading", 0, 0, 0, 0, "")

    def stage(self, stage: str, detail: str) -> None:
        self._tell(replace(self.now, stage=stage, detail=detail))

    def start(self, total: int, resumed: int) -> None:
        self._tell(AblationProgress("running", resumed, total, resumed, 0, ""))

    def run_done(self, key: RunKey, failed: bool) -> None:
        case = key.case
        detail = f"{key.policy}, {case.task} {case.context_tokens}, case {case.case}"
        now = self.now
        self._tell(replace(now, done=now.done + 1, failed=now.failed + failed, detail=detail))

    def _tell(self, now: AblationProgress) -> None:
        self.now = now
        if self.listener is not None:
            self.listener(now)
