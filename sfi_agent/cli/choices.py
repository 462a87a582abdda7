"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sfi_agent.config import SessionConfig
from sfi_agent.errors import ConfigError, explain
from sfi_agent.presets import PRESETS

__all__ = [
    "Color",
    "Compile",
    "ConfigFile",
    "Device",
    "Dtype",
    "EarlyLaunch",
    "Json",
    "PresetName",
    "check_output_file",
    "choose_config",
]

_PRESET_HELP = f"A named policy: {', '.join(PRESETS)}."

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Color = Annotated[bool, typer.Option("--color/--no-color", help="Use colours on a terminal.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A policy as .yaml, .yml or .json file."),
]
PresetName = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help=_PRESET_HELP, show_default=False)
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto (CUDA where there is one), cpu, cuda or cuda:N.",
        rich_help_panel=None,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto (the checkpoint's own), float32, bfloat16, float16."),
]

Compile = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Compile the layers of captured steps.")
]
EarlyLaunch = Annotated[
    bool,
    typer.Option(
        "--early-launch/--no-early-launch",
        help="Let compiled kernels start while the one before them finishes, on cards that can.",
    ),
]


def choose_config(
    file: Path | None, preset: str | None, default: SessionConfig | None = None
) -> SessionConfig:
    """The policy that `--config` or `--preset` names.

    Args:
        file: Value of `--config`.
        preset: Value of `--preset`.
        default: What is taken when neither is given; None for the defaults of a session.

    Raises:
        ConfigError: Both are given, or the one that is given is not valid.
    """
    if file is not None and preset is not None:
        raise ConfigError(
            explain(
                "chose a policy twice",
                got=f"--config {file} and --preset {preset}",
                allowed="one of the two",
            )
        )
    if file is not None:
        return SessionConfig.load(file)
    if preset is not None:
        return SessionConfig.preset(preset)
    return default or SessionConfig()


def check_output_file(option: str, file: Path | None, *, suffix: str = "") -> None:
    """Find out before a measurement, not after it, that its result could not be written.

    Args:
        option: Name of the option, for the message.
        file: Its value; None is no problem.
        suffix: What the name has to end in.

    Raises:
        ConfigError: There is no such folder, the file may not be written, or its name is wrong.
    """
    if file is None:
        return
    folder = file.absolute().parent
    allowed = ""
    if file.is_dir() or not folder.is_dir():
        allowed = "a file in a folder that exists"
    elif not os.access(file if file.exists() else folder, os.W_OK):
        allowed = "a file that can be written to"
    elif suffix and file.suffix.lower() != suffix:
        allowed = f"a file whose name ends in {suffix}"
    if allowed:
        raise ConfigError(explain(f"set {option}", got=str(file), allowed=allowed))
