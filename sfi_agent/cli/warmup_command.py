"""`sfi-agent warmup`: compile and capture the steps that a policy takes on a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sfi_agent.cli.choices import (
    Color,
    Compile,
    ConfigFile,
    Device,
    Dtype,
    EarlyLaunch,
    Json,
    PresetName,
    choose_config,
)
from sfi_agent.cli.models import EMBEDDED, is_local, load_engine
from sfi_agent.cli.output import Progress, make_console, print_json
from sfi_agent.cli.quantities import seconds_text

if TYPE_CHECKING:
    from sfi_agent.engine.warmup import WarmUpReport

__all__ = ["warmup"]

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"Directory or Hub id of a checkpoint, or '{EMBEDDED}'."),
]
Batch = Annotated[
    int, typer.Option(metavar="NUMBER", min=1, help="Sessions that will be decoded together.")
]
Context = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", min=0, help="Longest history to prepare for; 0 prepares for short ones."
    ),
]


def warmup(
    model: Model,
    config_file: ConfigFile = None,
    preset: PresetName = None,
    batch: Batch = 1,
    context: Context = 0,
    compile: Compile = True,
    early_launch: EarlyLaunch = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Compile and capture the steps that a policy takes on a checkpoint.

    Compiled code stays in the caches of torch and Triton on disk: a later process with the same
    model, policy and batch only captures, when it calls `engine.warmup`. On a CPU steps are eager
    and there is nothing to prepare.
    """
    config = choose_config(config_file, preset)
    with Progress(color=color) as progress:
        if is_local(model):
            progress.stage(f"Loading {model}")
        engine = load_engine(model, device=device, dtype=dtype)
        progress.stage(f"Preparing steps of {batch} x {context:,} tokens")
        report = engine.warmup(
            config,
            batch=batch,
            context_tokens=context,
            compiled=compile,
            early_launch=early_launch,
            on_progress=progress.detail,
        )
    if as_json:
        print_json(asdict(report))
    else:
        make_console(color=color).print(_said(report))


def _said(report: WarmUpReport) -> str:
    prepared = [
        word
        for word, true in (("compiled", report.compiled), ("captured", report.captured))
        if true
    ]
    reason = f": {report.reason}" if report.reason else ""
    if not prepared:
        return f"Nothing was prepared{reason}."
    return f"Steps are {' and '.join(prepared)}, in {seconds_text(report.seconds)}{reason}."
