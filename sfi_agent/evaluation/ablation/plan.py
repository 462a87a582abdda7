"""What an ablation still has to do: the runs of a grid, less those that the folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent.evaluation.ablation.attempt import Job
from sfi_agent.evaluation.ablation.details import spread
from sfi_agent.evaluation.ablation.grid import AblationGrid
from sfi_agent.evaluation.ablation.policies import expand
from sfi_agent.evaluation.ablation.policy import DENSE, Policy, Skipped
from sfi_agent.evaluation.ablation.store import ResultsFolder
from sfi_agent.evaluation.ablation.units import (
    CaseKey,
    RunKey,
    case_keys,
    detailed_case,
    run_keys,
)

__all__ = ["Plan"]

_DETAILED_TOGETHER = 4
"""Traces recorded by one job: they share a prefill, and several workers share the jobs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All units of a grid.

    Attributes:
        grid: What is run.
        policies: All policies, dense first.
        skipped: Combinations that are not run, with reasons.
        cases: All cases, in playing order.
    """

    grid: AblationGrid
    policies: tuple[Policy, ...]
    skipped: tuple[Skipped, ...]
    cases: tuple[CaseKey, ...]

    @classmethod
    def of(cls, grid: AblationGrid) -> Plan:
        """The plan of a grid."""
        found = expand(grid)
        return cls(grid, found.with_dense, found.skipped, tuple(case_keys(grid)))

    @property
    def names(self) -> list[str]:
        """Names of the policies, dense first."""
        return [policy.name for policy in self.policies]

    @property
    def runs(self) -> list[RunKey]:
        """Every run."""
        return list(run_keys(self.cases, self.names))

    @property
    def traced(self) -> list[RunKey]:
        """The runs that are recorded in detail: dense, and policies from all over the grid."""
        count = self.grid.traces.policies
        names = [DENSE, *spread(self.names[1:], count)] if count else []
        return [RunKey(detailed_case(self.grid), name) for name in names]

    def jobs(self, folder: ResultsFolder, *, retry_failed: bool) -> list[Job]:
        """The cases with runs that are missing, damaged or, if asked for, failed."""
        jobs = []
        for case in self.cases:
            missing = tuple(
                name for name in self.names if _missing(folder, RunKey(case, name), retry_failed)
            )
            if missing:
                jobs.append(Job(case, missing))
        return jobs

    def detail_jobs(self, folder: ResultsFolder) -> list[Job]:
        """The traces that are missing or less detailed than asked for, of runs that ended well."""
        wanted = [
            key.policy
            for key in self.traced
            if not self._has_trace(folder, key) and _came_to_its_end(folder.read_run(key))
        ]
        parts: Sequence[Sequence[str]] = [
            wanted[start : start + _DETAILED_TOGETHER]
            for start in range(0, len(wanted), _DETAILED_TOGETHER)
        ]
        case = detailed_case(self.grid)
        return [Job(case, tuple(part), detailed=True) for part in parts]

    def described(self) -> dict[str, list[dict[str, Any]]]:
        """The policies in parts and as configurations, and the combinations left out."""
        return {
            "policies": [
                {**policy.parts(), "config": policy.config.resolved()} for policy in self.policies
            ],
            "skipped": [{"policy": item.policy, "reason": item.reason} for item in self.skipped],
        }

    def as_fingerprint(self) -> dict[str, Any]:
        """What decides the results, as far as the grid says it.

        Policies stand with every option in force, so that grids that mean the same are the same.
        """
        return {
            "tasks": {
                f"{entry.name} {entry.protocol} {entry.answers}": {
                    "context_tokens": list(entry.context_tokens),
                    "cases": entry.cases,
                }
                for entry in self.grid.tasks
            },
            "seeds": list(self.grid.seeds),
            "policies": {policy.name: policy.config.resolved() for policy in self.policies},
        }

    def _has_trace(self, folder: ResultsFolder, key: RunKey) -> bool:
        trace = folder.read_trace(key)
        return trace is not None and trace["recorded"] == self.grid.traces.as_recorded()


def _missing(folder: ResultsFolder, key: RunKey, retry_failed: bool) -> bool:
    run = folder.read_run(key)
    return run is None or (retry_failed and run["status"] == "failed")


def _came_to_its_end(run: dict[str, Any] | None) -> bool:
    return run is not None and run["status"] == "done"
