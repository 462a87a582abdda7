"""Writes docs/cli.md from the commands themselves.

python -m sfi_agent.cli.command_reference            # rewrite docs/cli.md
python -m sfi_agent.cli.command_reference --check    # change nothing; fail when out of date
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sfi_agent.cli.main import app

__all__ = ["PAGE", "command_page", "main"]

PAGE = "cli.md"
_HEAD = """# Command line

Written by `make docs` from the commands; `sfi-agent COMMAND --help` says the same. Results go to
stdout; progress, warnings and errors go to stderr. Wrong input ends with status 2 and one message
that says what was attempted, got and allowed; `sfi-agent --debug COMMAND` shows the traceback. A
file that cannot be written while a command runs is status 1, Ctrl-C is 130. Colours are for
terminals, and the variable `NO_COLOR` turns them off everywhere. Tables that are too wide for a
terminal stand in parts below each other.
"""


def command_page() -> str:
    """The page as Markdown."""
    root: Any = typer.main.get_command(app)
    parts = [_HEAD, *_section(root, "sfi-agent")]
    return "\n".join(parts).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check the page; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sfi_agent.cli.command_reference")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    options = parser.parse_args(arguments)
    path: Path = options.docs / PAGE
    page = command_page()
    if path.is_file() and path.read_text(encoding="utf-8") == page:
        return 0
    if options.check:
        print(f"{path} is out of date; run `make docs`", file=sys.stderr)
        return 1
    path.write_text(page, encoding="utf-8")
    print(f"{path} rewritten")
    return 0


def _section(command: Any, path: str) -> Iterator[str]:
    """A command and, behind it, the commands below it."""
    children: dict[str, Any] = getattr(command, "commands", {})
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option"]
    names = [item.metavar for item in arguments]
    usage = [path, *names, *(["[OPTIONS]"] if options else []), *(["COMMAND"] if children else [])]
    yield f"## {path}\n"
    yield f"    {' '.join(usage)}\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    if arguments or options:
        yield "| option | default | meaning |\n|---|---|---|"
        yield from (_row(item) for item in (*arguments, *options))
        yield ""
    for name, child in children.items():
        yield from _section(child, f"{path} {name}")


def _row(parameter: Any) -> str:
    # Every option that takes a value says by its metavar what to write.
    value = "" if _takes_no_value(parameter) else f" {parameter.metavar}"
    names = [*parameter.opts, *parameter.secondary_opts]
    name = ", ".join(f"`{option}{value}`" for option in names)
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar}`"
    cells = (name, _default(parameter), parameter.help or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes_no_value(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False:
        return ""
    return "on" if parameter.default is True else f"`{parameter.default}`"


if __name__ == "__main__":
    raise SystemExit(main())
