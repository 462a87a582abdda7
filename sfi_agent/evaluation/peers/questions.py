"""Which cases are played: tasks by name, and their cases as ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sfi_agent.embedded.world import VARIANTS
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.peers.exchange import PlannedCase, Protocol
from sfi_agent.evaluation.peers.office_turns import OfficeConversation, OfficeLateLog
from sfi_agent.evaluation.peers.rendering import CaseRenderer
from sfi_agent.evaluation.tasks import Case, Task, task_named

__all__ = ["FIRST_SEED", "PROTOCOLS", "Questions", "peer_task", "prompt_json"]

PROTOCOLS: tuple[Protocol, ...] = ("dense_question", "sparse_question")
FIRST_SEED = 300_000
_OWN_TASKS: Mapping[str, Task] = {
    task.name: task
    for variant in VARIANTS
    for task in (OfficeConversation(variant), OfficeLateLog(variant))
}


def peer_task(name: str) -> Task:
    """A task by name: the evaluation tasks, and the conversations of this package.

    Raises:
        InputError: No task has that name.
    """
    return _OWN_TASKS[name] if name in _OWN_TASKS else task_named(name)


@dataclass(frozen=True, slots=True)
class Questions:
    """What is played.

    Attributes:
        tasks: Made by `peer_task`, or any `Task`.
        context_tokens: Tokens that context, questions and answers of a case may take together.
        cases: Cases per task, at least 1.
        protocols: Which of the two; each case is played under each of them.
        first_seed: Seed of the first case; the others follow.
    """

    tasks: tuple[Task, ...]
    context_tokens: int = 4096
    cases: int = 20
    protocols: tuple[Protocol, ...] = PROTOCOLS
    first_seed: int = FIRST_SEED

    def make(
        self, renderer: CaseRenderer
    ) -> tuple[list[PlannedCase], dict[str, tuple[Task, Case]]]:
        """The cases as ids, and what they were made from, by name.

        Raises:
            InputError: A number is out of range, or a case does not fit task or model.
        """
        if self.cases < 1 or not self.tasks or not self.protocols:
            raise InputError(
                explain(
                    "Side by side",
                    got=f"{self.cases} cases, {len(self.tasks)} tasks, "
                    f"{len(self.protocols)} protocols",
                    allowed="at least one of each",
                )
            )
        planned, sources = [], {}
        for task in self.tasks:
            made = [
                task.make_case(
                    context_tokens=self.context_tokens,
                    seed=seed,
                    count_tokens=renderer.count_tokens,
                )
                for seed in range(self.first_seed, self.first_seed + self.cases)
            ]
            for protocol in self.protocols:
                for case in made:
                    item = renderer.render(case, protocol)
                    planned.append(item)
                    sources[item.name] = (task, case)
        return planned, sources


def prompt_json(case: PlannedCase) -> dict[str, Any]:
    """Enough to see that another comparison has the same case, without its ids."""
    content = {**asdict(case), "name": ""}
    return {
        "case": case.name,
        "context_tokens": len(case.context_ids),
        "question_tokens": [len(turn.ids) for turn in case.turns],
        "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    }
