"""The command in this process: standard streams apart, and the stand-in for the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sfi_agent.cli import chat_command, demo_command
from sfi_agent.cli.main import app
from tests.test_cli.stand_in import stand_in_engine

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Runs `sfi-agent` with these arguments; `input` is stdin, `columns` the width."""

    def run(*arguments: str, input: str | None = None, columns: int = 100, **env: str) -> Result:
        variables = {"COLUMNS": str(columns), "NO_COLOR": None, "FORCE_COLOR": None, **env}
        return CliRunner().invoke(app, list(arguments), input=input, env=variables)

    return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine that commands get instead of the embedded model."""
    engine = stand_in_engine()
    for command in (demo_command, chat_command):
        monkeypatch.setattr(command, "load_engine", lambda *_, **__: engine)
    return engine
