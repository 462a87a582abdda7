"""Fixtures for the whole suite."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Networks and tensors here are so small that threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_memory_is_no_number(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that nobody has written hold NaN, so that whoever reads one is found out. With it
    come torch's deterministic kernels, which on a GPU would need settings of their own."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.node.get_closest_marker("gpu") is None)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _structlog_as_it_was() -> Iterator[None]:
    """`structlog.testing.capture_logs` leaves structlog configured, which turns printing on."""
    yield
    structlog.reset_defaults()


def _paths_of_the_packages() -> list[str]:
    """Where this process imports the three packages from: this checkout, or an installed wheel."""
    import sfi_agent
    import sfi_policies
    import sfi_selectors

    files = (sfi_agent.__file__, sfi_policies.__file__, sfi_selectors.__file__)
    return [str(Path(file).parent.parent) for file in files if file]


@pytest.fixture(scope="session")
def child_environment() -> Callable[..., dict[str, str]]:
    """The environment of a child process that imports the same packages as this one.

    A child does not inherit pytest's `pythonpath`. Folders given are put in front.
    """

    def environment(*folders: Path | str) -> dict[str, str]:
        paths = [*map(str, folders), *dict.fromkeys(_paths_of_the_packages())]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error"}

    return environment


@pytest.fixture(scope="session")
def child_python(child_environment: Callable[..., dict[str, str]]) -> Callable[..., str]:
    """Runs a program text in a fresh Python and returns what it printed, stripped."""

    def run(program: str, *folders: Path | str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=child_environment(*folders),
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
