"""The worker's side of a worker process: load the model, play the jobs that come, say so.

A worker stores its runs itself, so the main process learns only that they are there. When the
main process dies, however hard, its workers end at once: what they had not stored is played again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sfi_agent.errors import SfiError
from sfi_agent.evaluation.ablation.grid import AblationGrid
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.store import ResultsFolder
from sfi_agent.evaluation.ablation.this_process import ready_player
from sfi_agent.evaluation.ablation.units import RunKey

__all__ = ["WorkerArguments", "serve", "work"]


@dataclass(frozen=True, slots=True)
class WorkerArguments:
    """What a worker is started with; plain data, as it crosses processes."""

    grid: Mapping[str, Any]
    folder: str
    index: int
    threads: int | None


def work(connection: Connection, arguments: WorkerArguments) -> None:
    """The whole life of a worker process."""
    # Ctrl-C reaches every process of a terminal; the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    serve(connection, arguments)


def serve(connection: Connection, arguments: WorkerArguments) -> None:
    """Load, then play the jobs that come until the process is ended.

    Sends ("ready", facts), ("run", key, failed) and ("job_done",); where it cannot start,
    ("refused", name of the error, its message), and returns.
    """
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        plan = Plan.of(AblationGrid.model_validate(arguments.grid))
        device = _device(plan.grid.device, arguments.index)
        facts, player = ready_player(plan, ResultsFolder(Path(arguments.folder)), device)
    except SfiError as error:
        connection.send(("refused", type(error).__name__, str(error)))
        return
    connection.send(("ready", facts))

    def done(key: RunKey, failed: bool) -> None:
        connection.send(("run", key, failed))

    while True:
        player.play(connection.recv(), done)
        connection.send(("job_done",))


def _end_with_parent() -> None:
    """End this process when the main process is gone, whatever it was doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _device(wanted: str, index: int) -> str | None:
    """Workers take turns with the CUDA devices, unless the grid names one."""
    import torch

    if wanted in ("auto", "cuda") and torch.cuda.device_count() > 1:
        return f"cuda:{index % torch.cuda.device_count()}"
    return None
