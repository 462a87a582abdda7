"""`sfi-agent ablate`: policies on tasks, from a grid file to a table and a report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfi_agent.cli.ablate_tables import print_tables
from sfi_agent.cli.choices import Color, Json
from sfi_agent.cli.output import make_console, print_json
from sfi_agent.cli.quantities import count_text
from sfi_agent.errors import ConfigError, explain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from sfi_agent.evaluation.ablation import AblationGrid, AblationProgress, AblationResults

__all__ = ["ablate"]

FAILED_RUNS_STATUS = 1
INTERRUPTED_STATUS = 130
_LINES_WITHOUT_TERMINAL = 20
_FILE_CHARACTERS = 140
_BAR_CHARACTERS = 16

GridFile = Annotated[
    Path | None,
    typer.Argument(metavar="GRID", help="The grid as .yaml, .yml or .json file."),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Results folder; a folder of the same grid is resumed."),
]
ReportOf = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Play nothing: sum the results of this folder up again and write its report.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(metavar="NUMBER", min=1, help="Processes, each with the model in its own memory."),
]
ShowPlan = Annotated[
    bool, typer.Option("--plan", help="Play nothing: check the grid and say what it stands for.")
]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Play runs again that failed before.")
]


def ablate(
    grid_file: GridFile = None,
    out: Out = None,
    report_of: ReportOf = None,
    show_plan: ShowPlan = False,
    workers: Workers = 1,
    retry_failed: RetryFailed = False,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Play the policies of a grid on its tasks; write a table and an HTML report.

    Exit status: 0 when every run came to its end, 1 when some failed, 2 when nothing could be
    run, 130 when it was interrupted. What is finished is kept; the same command resumes.
    """
    if report_of is not None:
        _refuse_beside("--report", grid_file or out or (show_plan and "--plan"))
        from sfi_agent.evaluation.ablation import write_ablation_report

        _show(write_ablation_report(report_of), as_json=as_json, color=color)
        return
    if grid_file is None or (out is None and not show_plan):
        remedy = "write `sfi-agent ablate GRID --out DIR`"
        got = "no grid" if grid_file is None else "no --out"
        raise ConfigError(explain("ran an ablation", got=got, remedy=remedy))
    from sfi_agent.evaluation.ablation import AblationGrid

    grid = AblationGrid.load(grid_file)
    if show_plan or out is None:
        _refuse_beside("--plan", out and "--out")
        _show_plan(grid, as_json=as_json, color=color)
        return
    command = shlex.join(["sfi-agent", "ablate", str(grid_file), "--out", str(out)])
    results = _run(grid, out, workers, retry_failed, command, color)
    _show(results, as_json=as_json, color=color)
    if results.failed or not results.complete:
        raise typer.Exit(FAILED_RUNS_STATUS)


def _refuse_beside(option: str, other: object) -> None:
    if other:
        raise ConfigError(
            explain("ran an ablation", got=f"{other} beside {option}", allowed="one of them")
        )


def _run(
    grid: AblationGrid, out: Path, workers: int, retry_failed: bool, command: str, color: bool
) -> AblationResults:
    from sfi_agent.evaluation.ablation import run_ablation

    try:
        with _progress(color) as tell:
            return run_ablation(
                grid,
                out,
                workers=workers,
                retry_failed=retry_failed,
                command=command,
                on_progress=tell,
            )
    except KeyboardInterrupt as error:
        console = make_console(color=color, stderr=True)
        console.print(
            f"Interrupted. What is finished is in {out}; run the same command again to go on.",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED_STATUS) from error


def _show_plan(grid: AblationGrid, *, as_json: bool, color: bool) -> None:
    from sfi_agent.evaluation.ablation.plan import Plan

    plan = Plan.of(grid)
    described = plan.described()
    policies, skipped = described["policies"], described["skipped"]
    if as_json:
        print_json({**described, "cases": len(plan.cases), "planned_runs": len(plan.runs)})
        return
    console = make_console(color=color)
    for policy in policies:
        console.print(policy["name"], soft_wrap=True)
    _print_skipped(console, skipped)
    cases, runs = count_text(len(plan.cases), "case"), count_text(len(plan.runs), "run")
    console.print(f"Policies: {len(policies)}, on {cases}: {runs}.", soft_wrap=True)


@contextmanager
def _progress(color: bool) -> Iterator[Any]:
    """A listener that shows a bar with the time left on a terminal, else some twenty lines."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    console = make_console(color=color, stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    cell, rest = Column(no_wrap=True), Column(no_wrap=True, ratio=1, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}", table_column=cell.copy()),
        BarColumn(_BAR_CHARACTERS),
        MofNCompleteColumn(table_column=cell.copy()),
        TimeElapsedColumn(table_column=cell.copy()),
        TextColumn("left", table_column=cell.copy()),
        TimeRemainingColumn(table_column=cell.copy()),
        TextColumn("{task.fields[detail]}", table_column=rest, markup=False),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("loading", total=None, detail="")
        yield partial(_move, bar, task)


def _move(bar: Progress, task: TaskID, now: AblationProgress) -> None:
    if bar.tasks[task].description != now.stage:
        # The rate of another stage would spoil the time left of this one.
        bar.reset(task, total=now.total or None, completed=now.done)
    failed = f" ({now.failed} failed)" if now.failed else ""
    bar.update(
        task,
        description=now.stage,
        total=now.total or None,
        completed=now.done,
        detail=f"{now.detail}{failed}",
    )


class _Lines:
    """Progress where no bar can be drawn: a line per stage, and some in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._shown = -1

    def __call__(self, now: AblationProgress) -> None:
        if now.stage != self._stage:
            self._stage, self._shown = now.stage, -1
            if now.stage in ("loading", "writing"):
                self._console.print(f"{now.stage} {now.detail} ...", soft_wrap=True)
        if now.stage not in ("running", "recording") or not now.total:
            return
        part = now.done * _LINES_WITHOUT_TERMINAL // now.total
        if part > self._shown:
            self._shown = part
            failed = f", {now.failed} failed" if now.failed else ""
            noun = "runs" if now.stage == "running" else "details"
            self._console.print(f"{now.done} of {now.total} {noun}{failed}", soft_wrap=True)


def _show(results: AblationResults, *, as_json: bool, color: bool) -> None:
    document = results.document
    report = str(results.report) if results.report is not None else None
    if as_json:
        print_json({**document, "folder": str(results.folder), "report": report})
        return
    console = make_console(color=color)
    if not console.is_terminal:
        # Nobody folds lines of a file; on a terminal the names of policies fold.
        console.width = max(console.width, _FILE_CHARACTERS)
    print_tables(console, results.rows)
    for failure in results.failed[:5]:
        text = f"{failure['policy']}, case {failure['case']}: {failure['message']}"
        console.print(f"Failed: {text}", soft_wrap=True)
    _print_skipped(console, document["skipped"])
    for note in document["notes"]:
        console.print(note, soft_wrap=True)
    console.print(_last_line(document), soft_wrap=True)
    console.print(f"Results: {results.folder}", soft_wrap=True)
    if report is not None:
        console.print(f"Report: {report}", soft_wrap=True)


def _print_skipped(console: Console, skipped: list[dict[str, Any]]) -> None:
    for item in skipped:
        console.print(f"Skipped: {item['policy']}: {item['reason']}", soft_wrap=True)


def _last_line(document: Any) -> str:
    planned, failed = document["planned_runs"], document["failed_runs"]
    text = f"{document['finished_runs']} of {count_text(planned, 'run')} finished"
    return f"{text}, {failed} failed." if failed else f"{text}."
