"""docs/cli.md says what the commands say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from sfi_agent.cli.command_reference import PAGE, command_page, main
from sfi_agent.cli.main import app

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def commands(command: Any, path: str) -> list[tuple[str, Any]]:
    below: dict[str, Any] = getattr(command, "commands", {})
    found = [pair for name, child in below.items() for pair in commands(child, f"{path} {name}")]
    return [(path, command), *found]


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / PAGE).read_text(encoding="utf-8") == command_page(), "run `make docs`"


def test_every_command_and_option_is_on_the_page() -> None:
    page = command_page()
    listed = commands(typer.main.get_command(app), "sfi-agent")
    assert [path for path, _ in listed] == [
        "sfi-agent",
        "sfi-agent demo",
        "sfi-agent chat",
        "sfi-agent plugins",
        "sfi-agent eval",
        "sfi-agent ablate",
        "sfi-agent warmup",
        "sfi-agent bench",
        "sfi-agent bench decode",
        "sfi-agent bench kernels",
        "sfi-agent bench sessions",
    ]
    for path, command in listed:
        section = page.partition(f"\n## {path}\n")[2].partition("\n## ")[0]
        assert section, path
        for parameter in command.params:
            assert parameter.help and parameter.help in section
            for option in parameter.opts:
                if option.startswith("-"):
                    assert f"`{option}" in section, (path, option)
            takes_value = not getattr(parameter, "is_flag", False)
            assert not takes_value or parameter.metavar, (path, parameter.name)


def test_an_outdated_page_is_found_and_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--docs", str(tmp_path), "--check"]) == 1
    assert "out of date; run `make docs`" in capsys.readouterr().err
    assert not (tmp_path / PAGE).exists()
    assert main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / PAGE).read_text(encoding="utf-8") == command_page()
    assert main(["--docs", str(tmp_path), "--check"]) == 0
