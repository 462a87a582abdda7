"""Evaluation tasks: cases made offline from seeds, for any tokenizer and any length, and scores.

`TASKS` has them by name. Names that begin like a published benchmark's have its structure in our
own words: RULER-style, SCBench-style. Their numbers must not stand in one column with the
published ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.tasks.common_words import CommonWords
from sfi_agent.evaluation.tasks.copying import COPY_TASKS
from sfi_agent.evaluation.tasks.fitting import case_tokens
from sfi_agent.evaluation.tasks.frequent_words import FrequentWords
from sfi_agent.evaluation.tasks.long_generation import LongCounting, LongRecords, LongStateMachine
from sfi_agent.evaluation.tasks.mt_find import MultiTurnFind
from sfi_agent.evaluation.tasks.mt_kv import MultiTurnKeyValue
from sfi_agent.evaluation.tasks.mt_mix import MultiTurnMix
from sfi_agent.evaluation.tasks.mt_prefix_suffix import MultiTurnPrefixSuffix
from sfi_agent.evaluation.tasks.mt_variable_tracking import MultiTurnVariableTracking
from sfi_agent.evaluation.tasks.niah import NEEDLE_TASKS
from sfi_agent.evaluation.tasks.niah_hard import HardNeedles
from sfi_agent.evaluation.tasks.office import OFFICE_TASKS, OfficeLong
from sfi_agent.evaluation.tasks.positions import PositionScore, scores_by_position
from sfi_agent.evaluation.tasks.task import Case, Score, Task, TokenCounter, ToolExchange, Turn
from sfi_agent.evaluation.tasks.tool_loop import ToolLoop
from sfi_agent.evaluation.tasks.variable_tracking import HardVariableTracking, VariableTracking

__all__ = [
    "TASKS",
    "Case",
    "PositionScore",
    "Score",
    "Task",
    "TokenCounter",
    "ToolExchange",
    "Turn",
    "case_tokens",
    "scores_by_position",
    "task_named",
]

_ALL: tuple[Task, ...] = (
    *NEEDLE_TASKS,
    HardNeedles(),
    VariableTracking(),
    HardVariableTracking(),
    CommonWords(),
    FrequentWords(),
    MultiTurnKeyValue(),
    MultiTurnPrefixSuffix(),
    MultiTurnVariableTracking(),
    MultiTurnFind(),
    MultiTurnMix(),
    ToolLoop(),
    *OFFICE_TASKS,
    *COPY_TASKS,
    LongRecords(),
    LongCounting(),
    LongStateMachine(),
    OfficeLong(),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""Every built-in task by its name."""


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: There is none.
    """
    task = TASKS.get(name) if isinstance(name, str) else None
    if task is None:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        remedy = f"Perhaps {near[0]!r} was meant" if near else ""
        allowed = ", ".join(TASKS)
        raise InputError(
            explain("no task has this name", got=repr(name), allowed=allowed, remedy=remedy)
        )
    return task
