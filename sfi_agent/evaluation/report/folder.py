"""Reads a results folder and says in full what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.report.folder_format import FORMAT, RecallFile, Results, Trace

__all__ = ["Folder", "read_folder"]

_READING = "Read the results of an ablation"
_RUN_AGAIN = "Run `sfi-agent ablate GRID --out DIR` again: it resumes and writes the file anew"
_PROBLEMS_SHOWN = 6
_Part = TypeVar("_Part", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Folder:
    """What a results folder holds.

    Attributes:
        path: The folder.
        results: The table and the facts about the run.
        traces: Token views, in the order of the results' policies.
        recall: Attention mass recalled; None where it was not measured.
    """

    path: Path
    results: Results
    traces: tuple[Trace, ...]
    recall: RecallFile | None


def read_folder(directory: Path) -> Folder:
    """Read and check everything that the page shows.

    Raises:
        InputError: The folder is missing, is not an ablation's, is of another format, or one of
            its files is damaged or contradicts another; the message names the file.
    """
    if not directory.is_dir():
        raise _unusable(directory, "no such folder", "give the folder that `--out` named")
    file = directory / "results.json"
    if not file.is_file():
        raise _unusable(directory, _what_is_there(directory), _RUN_AGAIN)
    results = _read(file, Results)
    names = [policy.name for policy in results.policies]
    traces = [_read(path, Trace) for path in sorted(directory.glob("traces/*.json"))]
    recall_file = directory / "recall.json"
    recall = _read(recall_file, RecallFile) if recall_file.is_file() else None
    for path, policies in (
        (directory / "traces", {trace.policy for trace in traces}),
        (recall_file, set(recall.policies) if recall else set()),
    ):
        unknown = sorted(policies - set(names))
        if unknown:
            raise _unusable(
                path, f"policies that results.json does not list: {', '.join(unknown)}", _RUN_AGAIN
            )
    traces.sort(key=lambda trace: (names.index(trace.policy), trace.task, trace.context_tokens))
    return Folder(directory, results, tuple(traces), recall)


def _read(path: Path, kind: type[_Part]) -> _Part:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _unusable(path, f"a damaged file ({error})", _RUN_AGAIN) from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise _unusable(
            path,
            f"format {found!r}" if isinstance(data, dict) else f"a {type(data).__name__}",
            f"format {FORMAT} is read here: use the version of sfi-agent that wrote the folder",
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _unusable(path, _problems(error), _RUN_AGAIN) from error


def _problems(error: ValidationError) -> str:
    lines = []
    for entry in error.errors(include_url=False)[:_PROBLEMS_SHOWN]:
        where = ".".join(str(key) for key in entry["loc"]) or "the file"
        lines.append(f"{where}: {entry['msg']}")
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def _what_is_there(directory: Path) -> str:
    runs = len(list(directory.glob("runs/*.json")))
    if (directory / "store.json").is_file() or runs:
        return (
            f"a run without its summary: results.json is missing ({runs} finished runs are there)"
        )
    return "a folder without results.json, which is not an ablation's"


def _unusable(path: Path, got: str, remedy: str) -> InputError:
    return InputError(explain(f"{_READING} from {path}", got=got, remedy=remedy))
