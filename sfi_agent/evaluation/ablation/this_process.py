"""Plays jobs in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sfi_agent.evaluation.ablation.attempt import Job, RunDone
from sfi_agent.evaluation.ablation.model_facts import model_facts
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.player import EMBEDDED, CasePlayer, load_engine
from sfi_agent.evaluation.ablation.store import ResultsFolder

__all__ = ["ThisProcess", "ready_player", "threads_per_worker"]


def threads_per_worker(model: str, workers: int) -> int | None:
    """How many threads torch computes with in each worker; None leaves torch's own choice.

    The embedded model is so small that a second thread mostly waits for the first.
    """
    if model == EMBEDDED:
        return 1
    if workers == 1:
        return None
    return max(1, _processors() // workers)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ThisProcess:
    """Plays everything in this process, on one engine.

    Args:
        plan: What is run.
        folder: Where runs go.
    """

    def __init__(self, plan: Plan, folder: ResultsFolder) -> None:
        self._plan = plan
        self._folder = folder
        self._player: CasePlayer | None = None
        self._threads_before: int | None = None

    def start(self) -> dict[str, Any]:
        """Load the model, check the grid against it, and tell about it (`model_facts`).

        Raises:
            SfiError: As `load_engine` and `CasePlayer.check`.
        """
        import torch

        threads = threads_per_worker(self._plan.grid.model, 1)
        if threads is not None:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(threads)
        facts, self._player = ready_player(self._plan, self._folder, None)
        return facts

    def play(self, jobs: Sequence[Job], done: RunDone) -> list[str]:
        """Play all jobs; returns what went wrong beside failed runs (nothing, here)."""
        assert self._player is not None
        for job in jobs:
            self._player.play(job, done)
        return []

    def close(self) -> None:
        """Give back what was taken."""
        import torch

        self._player = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None


def ready_player(
    plan: Plan, folder: ResultsFolder, device: str | None
) -> tuple[dict[str, Any], CasePlayer]:
    """Load the model and check the grid against it.

    Returns:
        `model_facts` of the model, and a player of the plan's jobs.

    Raises:
        SfiError: As `load_engine` and `CasePlayer.check`.
    """
    engine = load_engine(plan.grid, device)
    player = CasePlayer(engine, plan.grid, plan.policies, folder)
    player.check()
    return model_facts(engine, plan.grid.model), player
