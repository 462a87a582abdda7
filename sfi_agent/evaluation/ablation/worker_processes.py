"""Deals jobs out to worker processes, each with its own engine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from sfi_agent.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    PluginError,
    SfiError,
    UnsupportedModelError,
    explain,
)
from sfi_agent.evaluation.ablation.attempt import Job, RunDone
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.store import ResultsFolder
from sfi_agent.evaluation.ablation.this_process import threads_per_worker
from sfi_agent.evaluation.ablation.worker import WorkerArguments, work

__all__ = ["WorkerProcesses", "as_error"]

_SECONDS_TO_END = 10.0


class WorkerProcesses:
    """Plays jobs in several processes, each with its own engine.

    Args:
        plan: What is run.
        folder: Where runs go.
        workers: How many processes.
    """

    def __init__(self, plan: Plan, folder: ResultsFolder, workers: int) -> None:
        self._plan = plan
        self._folder = folder
        self._count = workers
        self._workers: list[_Worker] = []

    def start(self) -> dict[str, Any]:
        """Start the first worker, which loads the model and checks the grid against it.

        Raises:
            SfiError: As `load_engine` and `CasePlayer.check`, said by the worker.
        """
        first = self._launch(0)
        message = first.receive()
        if message[0] == "ready":
            first.ready = True
            facts: dict[str, Any] = message[1]
            return facts
        raise as_error(message)

    def play(self, jobs: Sequence[Job], done: RunDone) -> list[str]:
        """Deal jobs out until none is left; returns what went wrong beside failed runs.

        Raises:
            SfiError: No worker is left to play on.
        """
        waiting, troubles = list(jobs), list[str]()
        wanted = min(self._count, max(1, len(waiting)))
        for index in range(len(self._workers), wanted):
            self._launch(index)
        self._deal(waiting)
        while any(not worker.ready or worker.job is not None for worker in self._workers):
            for worker in self._with_news():
                self._handle(worker, worker.receive(), done, troubles)
            self._deal(waiting)
        if waiting:
            raise SfiError(
                explain(
                    "ran an ablation",
                    got=f"no worker left: {'; '.join(troubles)}",
                    remedy="give fewer --workers, then run the same command again: it resumes",
                )
            )
        return troubles

    def close(self) -> None:
        """End all workers; runs that are stored stay."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _launch(self, index: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        grid = self._plan.grid
        arguments = WorkerArguments(
            grid.as_json(),
            str(self._folder.folder),
            index,
            threads_per_worker(grid.model, self._count),
        )
        process = context.Process(
            target=work, args=(theirs, arguments), daemon=True, name=f"ablation-{index}"
        )
        process.start()
        theirs.close()  # So that the end of the worker shows as the end of the pipe.
        worker = _Worker(index, process, ours)
        self._workers.append(worker)
        return worker

    def _with_news(self) -> list[_Worker]:
        connections = [worker.connection for worker in self._workers]
        ready = set(map(id, wait(connections)))
        return [worker for worker in self._workers if id(worker.connection) in ready]

    def _deal(self, waiting: list[Job]) -> None:
        for worker in self._workers:
            if worker.ready and worker.job is None and waiting:
                worker.job = waiting.pop(0)
                worker.connection.send(worker.job)

    def _handle(
        self, worker: _Worker, message: Sequence[Any], done: RunDone, troubles: list[str]
    ) -> None:
        kind = message[0]
        if kind == "ready":
            worker.ready = True
        elif kind == "run":
            done(message[1], message[2])
        elif kind == "job_done":
            worker.job = None
        else:
            place = f" on {worker.job.case}" if worker.job is not None else ""
            troubles.append(f"worker {worker.index}{place}: {message[2]}")
            self._workers.remove(worker)
            worker.process.join(_SECONDS_TO_END)
            worker.connection.close()


@dataclass(slots=True)
class _Worker:
    """One process as the main process sees it."""

    index: int
    process: BaseProcess
    connection: Connection
    ready: bool = False
    job: Job | None = None

    def receive(self) -> Sequence[Any]:
        """The next message; the end of the process is one, too."""
        try:
            message: Sequence[Any] = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(_SECONDS_TO_END)
            code = self.process.exitcode
            cause = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            return ("refused", "SfiError", f"the process ended by {cause}")
        return message


def as_error(message: Sequence[Any]) -> SfiError:
    """The error that a worker met at its start; those with more than a text come as SfiError."""
    kinds = (CheckpointError, ConfigError, InputError, PluginError, UnsupportedModelError)
    named = {kind.__name__: kind for kind in kinds}
    return named.get(message[1], SfiError)(message[2])
