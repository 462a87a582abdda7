"""Ablations: policies x tasks x context lengths x seeds, resumable, with a table and a report."""

from __future__ import annotations

from sfi_agent.evaluation.ablation.grid import AblationGrid
from sfi_agent.evaluation.ablation.grid_sections import TaskEntry, TraceSettings
from sfi_agent.evaluation.ablation.progress import AblationProgress
from sfi_agent.evaluation.ablation.runner import run_ablation, write_ablation_report
from sfi_agent.evaluation.ablation.summary import AblationResults

__all__ = [
    "AblationGrid",
    "AblationProgress",
    "AblationResults",
    "TaskEntry",
    "TraceSettings",
    "run_ablation",
    "write_ablation_report",
]
