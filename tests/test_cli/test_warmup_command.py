"""`sfi-agent warmup`: what it passes on, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sfi_agent.cli import warmup_command
from sfi_agent.config import SessionConfig
from sfi_agent.engine.warmup import WarmUpReport
from tests.test_cli.conftest import Invoke


class Warmed:
    """An engine that notes what it is asked to prepare."""

    report = WarmUpReport(12.5, compiled=True, captured=True)

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def warmup(
        self, config: SessionConfig, *, on_progress: Callable[[str], None], **asked: Any
    ) -> WarmUpReport:
        on_progress("preparing")
        self.asked = {"config": config, **asked}
        return self.report


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Warmed:
    made = Warmed()
    monkeypatch.setattr(warmup_command, "load_engine", lambda *_, **__: made)
    return made


def test_what_is_prepared_is_said(invoke: Invoke, engine: Warmed) -> None:
    result = invoke(
        "warmup", "embedded", "--preset", "fast", "--batch", "4", "--context", "8192",
        "--no-compile",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "Steps are compiled and captured, in 12.5 s.\n"
    assert "Preparing steps of 4 x 8,192 tokens" in result.stderr
    assert engine.asked == {
        "config": SessionConfig.preset("fast"),
        "batch": 4,
        "context_tokens": 8192,
        "compiled": False,
        "early_launch": True,
    }


@pytest.mark.usefixtures("engine")
def test_the_report_as_json(invoke: Invoke) -> None:
    result = invoke("warmup", "embedded", "--json")
    assert json.loads(result.stdout) == {
        "seconds": 12.5,
        "compiled": True,
        "captured": True,
        "reason": "",
    }


def test_on_a_cpu_there_is_nothing_to_prepare(
    invoke: Invoke, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup_command, "load_engine", lambda *_, **__: stand_in)
    result = invoke("warmup", "embedded")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Nothing was prepared: steps are eager")
