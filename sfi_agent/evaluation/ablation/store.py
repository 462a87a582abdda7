"""The results folder: one file per finished run, written so that no interrupt can tear it.

    store.json    what was run: policies, tasks, model, versions (the fingerprint)
    runs/         one JSON file per finished run
    traces/       details of a few runs

A file is written under a temporary name, flushed to the disk and renamed, and carries a checksum
of itself. Whatever a killed process left behind is a temporary file that nobody reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.ablation.folder_lock import locked_folder
from sfi_agent.evaluation.ablation.units import RunKey
from sfi_agent.observe.log import log_event

__all__ = ["FORMAT", "ResultsFolder", "write_atomically"]

FORMAT = 1
"""Version of the files in a results folder; a folder of another version is refused."""
_STORE, _TEMPORARY = "store.json", ".tmp"
_SHOWN_DIFFERENCES = 6
_FOREIGN_REMEDY = "give a new or empty folder as --out"


class ResultsFolder:
    """The folder of one ablation.

    Args:
        folder: Where results go.

    Attributes:
        folder: The same.
        damaged: Names of files that were there and could not be believed; their runs are redone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []

    @property
    def runs(self) -> Path:
        """Folder of the finished runs."""
        return self.folder / "runs"

    @property
    def traces(self) -> Path:
        """Folder of the detailed runs."""
        return self.folder / "traces"

    def check_usable(self) -> None:
        """Refuse a folder that is not ours before anything is loaded or written.

        Raises:
            InputError: It is a file, or holds other things than an ablation.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise _refused(self.folder, "a file", "a folder")
        if not self.folder.is_dir() or (self.folder / _STORE).exists():
            return
        entries = [item.name for item in self.folder.iterdir()]
        foreign = [name for name in entries if not _is_ours_or_temporary(name)]
        if foreign:
            got = f"a folder with {', '.join(sorted(foreign)[:4])} and no {_STORE}"
            raise _refused(self.folder, got, "an empty folder, or one that an ablation wrote")

    @contextmanager
    def opened(self, fingerprint: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for an ablation with this fingerprint; others are kept out.

        Raises:
            InputError: It holds another ablation (says what differs), it is damaged, or another
                process is writing to it.
        """
        self.check_usable()
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            self.traces.mkdir(exist_ok=True)
        except OSError as error:
            raise _refused(self.folder, str(error), "a folder that can be written to") from error
        with locked_folder(self.folder):
            path = self.folder / _STORE
            wanted = json.loads(json.dumps(fingerprint))
            if path.exists():
                _check_same(self.folder, self.fingerprint(), wanted)
            else:
                write_atomically(path, {"format": FORMAT, "fingerprint": wanted})
            for left in self.folder.rglob(f".*{_TEMPORARY}"):
                left.unlink(missing_ok=True)
            yield

    def fingerprint(self) -> dict[str, Any]:
        """What the folder's results were made from.

        Raises:
            InputError: The folder holds no ablation, or its `store.json` is damaged or of another
                version.
        """
        path = self.folder / _STORE
        if not path.is_file():
            got = "no store.json" if self.folder.is_dir() else "no such folder"
            remedy = "give the folder that --out named when the ablation ran"
            raise _refused(self.folder, got, "a folder that an ablation wrote", remedy)
        document = _read_checked(path)
        if document is None:
            remedy = f"the runs cannot be told apart without it; {_FOREIGN_REMEDY}"
            raise _refused(self.folder, "a damaged store.json", "", remedy)
        if document.get("format") != FORMAT:
            got = f"results of format {document.get('format')!r}"
            raise _refused(self.folder, got, f"format {FORMAT}")
        found: dict[str, Any] = document["fingerprint"]
        return found

    def run_path(self, key: RunKey) -> Path:
        """The file of a run."""
        return self.runs / f"{key.id}.json"

    def trace_path(self, key: RunKey) -> Path:
        """The file of a run's details."""
        return self.traces / f"{key.id}.json"

    def failed_trace_path(self, key: RunKey) -> Path:
        """Where it is said why a run's details could not be recorded; no reader takes it for a
        trace."""
        return self.traces / f"{key.id}.failed"

    def read_run(self, key: RunKey) -> dict[str, Any] | None:
        """A stored run; None when it is missing or damaged."""
        return self._read(self.run_path(key), key)

    def read_trace(self, key: RunKey) -> dict[str, Any] | None:
        """A stored trace; None when it is missing or damaged."""
        return self._read(self.trace_path(key), key)

    def read_runs(self, keys: Iterable[RunKey]) -> dict[RunKey, dict[str, Any]]:
        """All stored runs among these."""
        found = ((key, self.read_run(key)) for key in keys)
        return {key: run for key, run in found if run is not None}

    def read_results(self) -> dict[str, Any]:
        """The last `results.json`; empty when there is none, or it is damaged or of another
        version: everything in it but the command line comes from other files."""
        path = self.folder / "results.json"
        document = _read_checked(path) if path.exists() else None
        return document if document is not None and document.get("format") == FORMAT else {}

    def remove_other_traces(self, keys: Iterable[RunKey]) -> None:
        """Remove traces that the grid does not ask for any more, so that no page shows them."""
        wanted = {self.trace_path(key).name for key in keys}
        for path in self.traces.glob("*.json"):
            if path.name not in wanted:
                path.unlink()

    def _read(self, path: Path, key: RunKey) -> dict[str, Any] | None:
        if not path.exists():
            return None
        document = _read_checked(path)
        identity = key.as_json()
        if document is not None and document.get("format") == FORMAT:
            if all(document.get(name) == value for name, value in identity.items()):
                return document
        name = path.relative_to(self.folder).as_posix()
        if name not in self.damaged:
            self.damaged.append(name)
            log_event("warning", "ablation_file_damaged", file=str(path), action="redo the run")
        return None


def write_atomically(
    path: Path, document: Mapping[str, Any] | str, *, indent: int | None = 1
) -> None:
    """Write a file so that it is there as a whole or not at all, also when the power fails.

    Args:
        path: Where; an existing file is replaced.
        document: Text, or JSON data, which gets a checksum of itself.
        indent: Of JSON; None puts everything into one line.

    Raises:
        InputError: The system refuses; an existing file is as it was.
    """
    text = document if isinstance(document, str) else _checked_text(document, indent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        remedy = "make room or give rights, then run the same command again: it resumes"
        raise InputError(explain(f"wrote {path}", got=str(error), remedy=remedy)) from error


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and its rename needs no flush of them.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked_text(document: Mapping[str, Any], indent: int | None) -> str:
    body = {key: value for key, value in document.items() if key != "checksum"}
    # Read back first: what was written as a tuple or an integer key would not compare equal.
    body = json.loads(json.dumps(body, allow_nan=False))
    checked = {**body, "checksum": _checksum(body)}
    return json.dumps(checked, ensure_ascii=False, indent=indent) + "\n"


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_checked(path: Path) -> dict[str, Any] | None:
    """The document of a file; None when it is not what `write_atomically` wrote."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict):
        return None
    checksum = document.pop("checksum", None)
    return document if checksum == _checksum(document) else None


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = list(_differences(found, wanted))
    if not differing:
        return
    lines = differing[:_SHOWN_DIFFERENCES]
    if len(differing) > _SHOWN_DIFFERENCES:
        lines.append(f"and {len(differing) - _SHOWN_DIFFERENCES} more differences")
    raise _refused(
        folder,
        f"results of another ablation ({'; '.join(lines)})",
        "the same grid, model and versions",
        "give another folder as --out, or run the grid.yaml of that folder",
    )


def _differences(there: object, now: object, path: str = "") -> Iterator[str]:
    """Where two fingerprints differ, one line each; a whole section that one lacks is one line."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in {**there, **now}:
            inner = f"{path}.{key}" if path else str(key)
            if key not in now or key not in there:
                yield f"{inner} only {'there' if key in there else 'now'}"
            else:
                yield from _differences(there[key], now[key], inner)
    elif there != now:
        yield f"{path}: {json.dumps(there)} there, {json.dumps(now)} now"


def _is_ours_or_temporary(name: str) -> bool:
    return name in ("runs", "traces", ".lock") or name.endswith(_TEMPORARY)


def _refused(folder: Path, got: str, allowed: str, remedy: str = _FOREIGN_REMEDY) -> InputError:
    return InputError(
        explain(f"used {folder} as results folder", got=got, allowed=allowed, remedy=remedy)
    )
