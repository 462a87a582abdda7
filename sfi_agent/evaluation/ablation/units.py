"""Units of work: which runs an ablation consists of, and what each of them is called.

A run is one policy on one case. Runs of the same case belong together: its history is prefilled
once and forked for each policy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sfi_agent.evaluation.ablation.grid import FIRST_CASE_SEED, AblationGrid
from sfi_agent.evaluation.ablation.grid_sections import CASES_PER_SEED

__all__ = ["CaseKey", "RunKey", "case_keys", "detailed_case", "run_keys"]

_SLUG_LIMIT_CHARACTERS = 48


@dataclass(frozen=True, slots=True, order=True)
class CaseKey:
    """One case of the grid.

    Attributes:
        task: Name of the task.
        context_tokens: Length of the context that was asked for.
        protocol: "dense_question" or "sparse_question".
        answers: "own" or "reference".
        seed: One of the grid's seeds.
        case: Number of the case, from 0.
    """

    task: str
    context_tokens: int
    protocol: Literal["dense_question", "sparse_question"]
    answers: Literal["own", "reference"]
    seed: int
    case: int

    @property
    def case_seed(self) -> int:
        """The seed that the task makes the case from; no two cases of a task share one."""
        return FIRST_CASE_SEED + self.seed * CASES_PER_SEED + self.case

    def as_json(self) -> dict[str, Any]:
        """All fields and the case seed."""
        return {**asdict(self), "case_seed": self.case_seed}


@dataclass(frozen=True, slots=True, order=True)
class RunKey:
    """One policy on one case: what is stored, and never computed twice.

    Attributes:
        case: The case.
        policy: Name of the policy.
    """

    case: CaseKey
    policy: str

    @property
    def id(self) -> str:
        """Names the run's files: readable, and unique by its last part."""
        case = self.case
        text = json.dumps([*asdict(case).values(), self.policy])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        policy = re.sub(r"[^A-Za-z0-9]+", "_", self.policy).strip("_")[:_SLUG_LIMIT_CHARACTERS]
        place = f"{case.task}-{case.context_tokens}-s{case.seed}-c{case.case:04d}"
        return f"{place}-{policy or 'policy'}-{digest}"

    def as_json(self) -> dict[str, Any]:
        """The fields that identify the run in its file."""
        return {"id": self.id, "policy": self.policy, **self.case.as_json()}


def case_keys(grid: AblationGrid) -> list[CaseKey]:
    """Every case of a grid, in the order they are played.

    All tasks and lengths get their first case before any gets its second, so that what an
    interrupted ablation has is spread evenly.
    """
    last = max(entry.cases for entry in grid.tasks)
    return [
        CaseKey(entry.name, tokens, entry.protocol, entry.answers, seed, case)
        for seed in grid.seeds
        for case in range(last)
        for entry in grid.tasks
        if case < entry.cases
        for tokens in entry.context_tokens
    ]


def run_keys(cases: Sequence[CaseKey], policies: Sequence[str]) -> Iterator[RunKey]:
    """Every run: each policy on each case."""
    return (RunKey(case, policy) for case in cases for policy in policies)


def detailed_case(grid: AblationGrid) -> CaseKey:
    """The case that is recorded in detail: the first one of the first task."""
    return case_keys(grid)[0]
