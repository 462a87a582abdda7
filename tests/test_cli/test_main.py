"""The command as a whole: starting it is cheap, and errors are one message on stderr."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import typer
import yaml
from typer.testing import CliRunner

from sfi_agent import ConfigError
from sfi_agent.cli import demo_command, plugins_command
from sfi_agent.cli.main import app
from tests.distributions import write_distribution
from tests.test_cli.conftest import Invoke

COMMAND = "from sfi_agent.cli.main import app; app(prog_name='sfi-agent')"


def child(
    environment: dict[str, str], *arguments: str, program: str = COMMAND
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**environment, "COLUMNS": "100"},
        timeout=100,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["chat", "--help"],
        ["bench", "decode", "--help"],
        ["plugins"],
    ],
)
def test_help_and_plugins_import_no_torch(
    arguments: list[str], child_environment: Callable[..., dict[str, str]]
) -> None:
    program = f"""
import atexit, sys
atexit.register(lambda: print(sorted({{"torch", "transformers", "spacy"}} & set(sys.modules))))
{COMMAND}
"""
    done = child(child_environment(), *arguments, program=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) > 5


def test_a_broken_plugin_stops_neither_help_nor_the_list(
    tmp_path: Path, child_environment: Callable[..., dict[str, str]]
) -> None:
    source = {"broken_plugin_module": "import nothing_of_this_name"}
    write_distribution(tmp_path, "sad-plugins", source, {"sad": "broken_plugin_module"}, "0.7")
    environment = child_environment(tmp_path)
    assert child(environment, "--help").returncode == 0
    listed = child(environment, "plugins", "--json")
    assert listed.returncode == 1
    document = json.loads(listed.stdout)
    assert "kl_fusion" in [entry["name"] for entry in document["selectors"]]
    (broken,) = document["broken"]
    assert broken["plugin"] == "sad" and broken["origin"] == "sad-plugins 0.7"
    assert "nothing_of_this_name" in broken["error"]


@pytest.mark.parametrize("columns", [50, 60, 80, 200])
def test_help_cuts_nothing_off(columns: int) -> None:
    def walk(command: Any, path: tuple[str, ...]) -> None:
        asked = [*path, "--help"]
        lines = CliRunner().invoke(app, asked, terminal_width=columns).stdout.splitlines()
        assert max(map(len, lines)) <= columns
        told = [line for line in lines if not line.startswith("Usage: ")]
        assert not any("…" in line or "..." in line for line in told), path
        for option in command.params:
            if option.param_type_name == "option":
                assert any(line.strip().startswith(option.opts[0]) for line in lines), option.opts
        for name, child in getattr(command, "commands", {}).items():
            assert any(line.split()[:1] == [name] for line in lines), name
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ())


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("sfi-agent ") and len(result.stdout.split()) > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--preset", "faihtful"], "no preset has this name; got 'faihtful'"),
        (["demo", "--preset", "fast", "--config", "x.yaml"], "chose a policy twice"),
        (["chat", "embedded", "--config", "missing.yaml"], "missing.yaml"),
        (["--log-level", "loud", "plugins"], "allowed: debug, info, warning, error"),
        (["chat", "./no/such/checkpoint"], "got no such directory; allowed: a directory"),
        (["bench", "decode", "--out", "/nowhere/at/all.json"], "a folder that exists"),
        (["bench", "decode", "--plot", "times.png"], "a file whose name ends in .svg"),
        (["ablate", "--report", "/nowhere"], "give the folder that --out named"),
        (["ablate", "missing.yaml", "--plan"], "missing.yaml"),
    ],
)
def test_errors_are_one_message_on_stderr(arguments: list[str], said: str, invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    progress, _, message = result.stderr.rpartition("sfi-agent: ")
    assert said in message and len(message.strip().splitlines()) == 1
    assert "Traceback" not in progress and "sfi-agent" not in progress


@pytest.mark.parametrize(
    "command", [("eval", "embedded"), ("bench", "decode"), ("bench", "sessions")]
)
def test_a_file_that_cannot_be_written_is_found_out_before_anything_is_measured(
    command: tuple[str, ...], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    result = invoke(*command, "--out", str(tmp_path / "result.json"))
    assert result.exit_code == 2 and "a file that can be written to" in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_is_one_message(
    options: tuple[str, ...], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("print_json", "_print"):
        monkeypatch.setattr(plugins_command, name, full)
    result = invoke("plugins", *options)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("sfi-agent: ") and "No space left" in result.stderr
    assert isinstance(invoke("--debug", "plugins", *options).exception, OSError)


def test_a_list_of_wrong_entries_is_not_called_empty_too(invoke: Invoke, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    task = {"name": "office_reprot_easy", "context_tokens": [600]}
    grid.write_text(yaml.safe_dump({"tasks": [task]}))
    wrong = invoke("ablate", str(grid), "--plan").stderr
    assert "(1 problem)" in wrong and "Perhaps 'office_report_easy' was meant" in wrong
    grid.write_text(yaml.safe_dump({"tasks": []}))
    assert "got []; allowed: a list of at least 1" in invoke("ablate", str(grid), "--plan").stderr


def test_debug_shows_where_an_error_came_from(invoke: Invoke) -> None:
    result = invoke("--debug", "demo", "--preset", "faihtful")
    assert isinstance(result.exception, ConfigError)


def test_errors_in_a_child_leave_stdout_empty(
    child_environment: Callable[..., dict[str, str]],
) -> None:
    done = child(child_environment(), "demo", "--json", "--config", "missing.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert "cannot read the configuration missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["nope"], ["demo", "--nope"], ["chat"]])
def test_unknown_words_are_usage_errors(arguments: list[str], invoke: Invoke) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == ""


def test_log_events_go_to_stderr_and_nothing_stays_configured(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*_: object, **__: object) -> None:
        log = structlog.get_logger("sfi_agent")
        log.info("quiet_event", tokens=3)
        log.warning("loud_event", tokens=4, cause=None)
        raise ConfigError("the end.")

    monkeypatch.setattr(demo_command, "load_engine", say)
    assert not structlog.is_configured()
    by_default, informed = invoke("demo"), invoke("--log-level", "info", "demo")
    assert "sfi-agent: warning: loud_event: tokens 4\n" in by_default.stderr
    assert "quiet_event" not in by_default.stderr
    assert "sfi-agent: info: quiet_event: tokens 3\n" in informed.stderr
    assert by_default.stdout == informed.stdout == ""
    assert not structlog.is_configured()
    assert logging.getLogger("sfi_agent").handlers == []
