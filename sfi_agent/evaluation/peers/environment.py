"""The other Python: an environment with the versions that kvpress is pinned to, and runs in it.

kvpress 0.5.5 works with transformers up to 5.3 only, and replaces attention functions of the
process that imports it. So it gets an environment and a process of its own; it is made by an
explicit call and never on the way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sfi_agent.errors import SfiError, explain
from sfi_agent.evaluation.peers import worker
from sfi_agent.evaluation.peers.exchange import ArmRun, run_from_json

__all__ = [
    "PINS",
    "PeerError",
    "check_environment",
    "environment_python",
    "make_environment",
    "python_versions",
    "run_worker",
]

PINS = {"torch": "2.13.0", "transformers": "5.2.0", "kvpress": "0.5.5"}
"""Versions that were seen to work together."""
_COMMAND = "python -m sfi_agent.evaluation.peers --make-environment DIR"
_SHOWN_CHARACTERS = 2000

Progress = Callable[[str], None]


class PeerError(SfiError):
    """The environment of a peer is missing or wrong, or its worker failed."""


def environment_python(folder: Path) -> Path:
    """Where a virtual environment keeps its Python."""
    if sys.platform == "win32":
        return folder / "Scripts" / "python.exe"
    return folder / "bin" / "python"


def make_environment(folder: Path, *, base_python: str = sys.executable) -> Path:
    """Create a virtual environment and install the pinned packages with its pip.

    Args:
        folder: Where; must not exist yet.
        base_python: The Python that it is made from, 3.10 or newer.

    Returns:
        The environment's Python.

    Raises:
        PeerError: The folder exists, or a command failed, with the end of what it printed.
    """
    if folder.exists():
        raise PeerError(
            explain(
                f"Making an environment in {str(folder)!r}",
                got="a folder that exists",
                remedy="Name a new one, or use it as it is with --kvpress-python "
                f"{environment_python(folder)}",
            )
        )
    python = environment_python(folder)
    pins = [f"{name}=={version}" for name, version in PINS.items()]
    for command in (
        [base_python, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *pins],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise PeerError(
                explain(
                    f"Making an environment in {str(folder)!r}: {' '.join(command)}",
                    got=f"exit status {done.returncode}: {done.stderr[-_SHOWN_CHARACTERS:]}",
                    remedy="Remove the folder and try again, or make an environment with "
                    f"{', '.join(pins)} by hand",
                )
            )
    return python


def check_environment(python: Path | None) -> dict[str, str | None]:
    """The versions in the peer's environment.

    Args:
        python: Its Python; None means that none was given.

    Raises:
        PeerError: There is none, it does not run, or its versions are not the pinned ones.
    """
    if python is None or not python.is_file():
        raise PeerError(
            explain(
                "Side by side with kvpress",
                got="no environment for it" if python is None else f"no Python at {str(python)!r}",
                remedy=f"Make one with `{_COMMAND}` (it downloads torch, transformers and "
                "kvpress), give its Python with --kvpress-python, or name arms that do without",
            )
        )
    found = python_versions(python)
    # What stands behind "+" names a build, such as the one for the CPU.
    wrong = {
        name: found.get(name)
        for name, pin in PINS.items()
        if (found.get(name) or "").split("+")[0] != pin
    }
    if wrong:
        raise PeerError(
            explain(
                f"Side by side with kvpress by {str(python)!r}",
                got=", ".join(f"{name} {version or 'missing'}" for name, version in wrong.items()),
                allowed=", ".join(f"{name} {pin}" for name, pin in PINS.items()),
                remedy=f"Make a fresh environment with `{_COMMAND}`",
            )
        )
    return found


def python_versions(python: Path | str) -> dict[str, str | None]:
    """What `worker.versions` finds in another Python.

    Raises:
        PeerError: It does not run the script, or prints something else.
    """
    try:
        done = subprocess.run(
            [str(python), "-I", worker.__file__, "versions"], capture_output=True, text=True
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        raise PeerError(
            explain(
                f"Asking {str(python)!r} for its versions",
                got=f"{type(error).__name__}: {error}",
                remedy="Give the Python of a virtual environment",
            )
        ) from error
    return {str(name): version for name, version in found.items()}


def run_worker(
    python: Path | str, plan: dict[str, Any], progress: Progress | None = None
) -> list[ArmRun]:
    """Play a plan in another Python.

    Args:
        python: Its executable.
        plan: What `plan_json` makes.
        progress: Called with a line for every finished arm and case.

    Raises:
        PeerError: The worker failed or left results out, with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="sfi-peers-") as name:
        folder = Path(name)
        plan_path, results_path, log_path = (
            folder / file for file in ("plan.json", "results.jsonl", "log.txt")
        )
        plan_path.write_text(json.dumps(plan), encoding="utf-8")
        # -I: no environment variable and no folder of ours reaches the other packages.
        command = [str(python), "-I", worker.__file__, "play", str(plan_path), str(results_path)]
        with log_path.open("w", encoding="utf-8") as log:
            status = _run(command, log, progress or (lambda line: None))
        said = log_path.read_text(encoding="utf-8", errors="replace")[-_SHOWN_CHARACTERS:]
        expected = sum(len(arm["cases"]) for arm in plan["arms"])
        runs = list(_read(results_path)) if results_path.exists() else []
    if status != 0 or len(runs) != expected:
        raise PeerError(
            explain(
                f"Side by side: the worker in {str(python)!r}",
                got=f"exit status {status} and {len(runs)} of {expected} results: {said}",
                remedy="See the end of its output above",
            )
        )
    return runs


def _run(command: list[str], log: Any, progress: Progress) -> int:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress(line.rstrip())
        except BaseException:
            process.kill()
            raise
    return process.returncode


def _read(path: Path) -> Iterator[ArmRun]:
    """The runs of a results file; a last line cut off by a crash is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            if "done" not in record:
                yield run_from_json(record)
        except (ValueError, KeyError, TypeError):
            return
