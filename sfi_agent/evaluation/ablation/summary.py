"""Writes what stands at the end of an ablation: results.json, results.csv, recall.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sfi_agent.evaluation.ablation.model_facts import versions
from sfi_agent.evaluation.ablation.plan import Plan
from sfi_agent.evaluation.ablation.store import FORMAT, ResultsFolder, write_atomically
from sfi_agent.evaluation.ablation.stretches import STRETCH_TOKENS
from sfi_agent.evaluation.ablation.table import COLUMNS, csv_rows, table_rows
from sfi_agent.evaluation.ablation.units import RunKey

__all__ = ["AblationResults", "write_results"]


@dataclass(frozen=True, slots=True)
class AblationResults:
    """What an ablation has found so far.

    Attributes:
        folder: The results folder.
        document: What `results.json` holds.
        report: The HTML page; None where none was written.
    """

    folder: Path
    document: Mapping[str, Any]
    report: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table: one row per policy, task, context length and protocol."""
        rows: list[dict[str, Any]] = self.document["rows"]
        return rows

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Runs that ended in an error, with what and why."""
        failed: list[dict[str, Any]] = self.document["failed"]
        return failed

    @property
    def complete(self) -> bool:
        """Whether every run of the grid has come to an end, well or in an error."""
        return bool(self.document["complete"])


def write_results(
    plan: Plan,
    folder: ResultsFolder,
    model: Mapping[str, Any],
    *,
    command: str | None = None,
    workers: int = 1,
    notes: tuple[str, ...] = (),
) -> AblationResults:
    """Sum up what the folder holds, complete or not, and write it there.

    Args:
        plan: What was to be run.
        folder: Where the runs are.
        model: `model_facts` of the model.
        command: The command line that ran it; None from Python.
        workers: How many processes played.
        notes: Sentences for the head of the report.
    """
    runs = folder.read_runs(plan.runs)
    rows = table_rows(plan.policies, runs)
    folder.remove_other_traces(plan.traced)
    traces = {key: folder.read_trace(key) for key in plan.traced}
    document: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "title": plan.grid.title,
        "model": dict(model),
        "versions": versions(),
        "workers": workers,
        **_progress(plan, runs),
        **plan.described(),
        "failed": [_failure(folder, key, run) for key, run in runs.items() if _failed(run)],
        "notes": [*notes, *_damage(folder), *_trace_failures(plan, folder)],
        "stretch_tokens": STRETCH_TOKENS,
        "rows": rows,
    }
    write_atomically(folder.folder / "results.csv", _csv_text(plan, rows))
    _write_recall(plan, folder, traces)
    write_atomically(folder.folder / "results.json", document)
    return AblationResults(folder.folder, document)


def _progress(plan: Plan, runs: Mapping[RunKey, Mapping[str, Any]]) -> dict[str, Any]:
    planned = len(plan.runs)
    failed = sum(map(_failed, runs.values()))
    return {
        "planned_runs": planned,
        "finished_runs": len(runs) - failed,
        "failed_runs": failed,
        "complete": len(runs) == planned,
        "seconds": sum(turn["seconds"] for run in runs.values() for turn in run["turns"]),
    }


def _failed(run: Mapping[str, Any]) -> bool:
    return bool(run["status"] == "failed")


def _failure(folder: ResultsFolder, key: RunKey, run: Mapping[str, Any]) -> dict[str, Any]:
    case = key.case
    return {
        "policy": key.policy,
        "task": case.task,
        "context_tokens": case.context_tokens,
        "protocol": case.protocol,
        "answers": case.answers,
        "seed": case.seed,
        "case": case.case,
        "error": run["error"]["type"],
        "message": run["error"]["message"],
        "run": folder.run_path(key).relative_to(folder.folder).as_posix(),
    }


def _damage(folder: ResultsFolder) -> list[str]:
    return [
        f"{name} was damaged; it was played again, or is not in the table"
        for name in folder.damaged
    ]


def _trace_failures(plan: Plan, folder: ResultsFolder) -> list[str]:
    return [
        f"The details of {key.policy!r} could not be recorded; "
        f"{path.relative_to(folder.folder).as_posix()} says why"
        for key in plan.traced
        if (path := folder.failed_trace_path(key)).exists()
    ]


def _write_recall(
    plan: Plan, folder: ResultsFolder, traces: Mapping[RunKey, Mapping[str, Any] | None]
) -> None:
    recall = {
        key.policy: trace["recall"]
        for key, trace in traces.items()
        if trace is not None and trace["recall"] is not None
    }
    path = folder.folder / "recall.json"
    if not recall:
        path.unlink(missing_ok=True)
        return
    case = plan.traced[0].case
    write_atomically(path, {"format": FORMAT, **case.as_json(), "policies": recall})


def _csv_text(plan: Plan, rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in csv_rows(plan.policies, rows):
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
