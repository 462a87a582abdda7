"""`sfi-agent demo`: the embedded model answers questions about a long log, slow-fast and dense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfi_agent.cli.choices import (
    Color,
    ConfigFile,
    Device,
    Dtype,
    Json,
    PresetName,
    choose_config,
)
from sfi_agent.cli.models import EMBEDDED, EMBEDDED_THREADS, cpu_threads, load_engine
from sfi_agent.cli.output import Progress, make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.cli.demo_records import DemoTurn
    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine

__all__ = ["demo"]

_PRESET = "faithful"
_SELECTED_TOKENS = 512
_MAX_NEW_TOKENS = 256


def demo(
    log_tokens: Annotated[
        int, typer.Option(metavar="TOKENS", help="Least length of the office log.")
    ] = 4096,
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="Which log and questions.")] = 0,
    preset: PresetName = None,
    config_file: ConfigFile = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Annotated[
        int,
        typer.Option(
            metavar="NUMBER", min=1, help="CPU threads; more than one rarely helps a small model."
        ),
    ] = EMBEDDED_THREADS,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Run a tool-calling session of several turns over a long office log on the embedded model.

    Shows which steps were slow and why, what was reused, and the same turns decoded dense beside
    them. No download. Without --preset or --config the policy is `faithful` with 512 selected
    tokens.
    """
    config, policy = _policy(config_file, preset)
    with Progress(color=color) as progress, cpu_threads(threads):
        progress.stage("Loading the embedded model")
        engine = load_engine(EMBEDDED, device=device, dtype=dtype)
        console = None if as_json else make_console(color=color)
        document = _play(engine, config, policy, log_tokens, seed, console, progress)
    if as_json:
        print_json(document)


def _play(
    engine: Engine,
    config: SessionConfig,
    policy: str,
    log_tokens: int,
    seed: int,
    console: Console | None,
    progress: Progress,
) -> dict[str, Any]:
    """Play the demo, on the screen where there is a console; the JSON document."""
    from sfi_agent.cli.demo_play import long_enough_conversation, play
    from sfi_agent.cli.demo_records import Demo
    from sfi_agent.cli.demo_report import demo_json
    from sfi_agent.cli.demo_screen import DemoScreen

    progress.stage("Writing the office log")
    conversation, length = long_enough_conversation(seed, log_tokens, _counter(engine))
    demo, model = Demo(conversation, length, config), _model(engine, policy)
    screen = DemoScreen(console, demo, model) if console is not None else None
    progress.pause()
    if screen is not None:
        screen.opening()

    def show(turn: DemoTurn) -> None:
        progress.pause()
        if screen is not None:
            screen.turn(turn)

    play(
        engine,
        demo,
        on_stage=progress.stage,
        on_token=lambda tokens: progress.detail(f"{tokens} tokens"),
        on_turn=show,
    )
    if screen is not None:
        screen.closing()
    return demo_json(demo, model)


def _policy(file: Path | None, preset: str | None) -> tuple[SessionConfig, str]:
    """The policy and how to call it."""
    from sfi_agent.config import SessionConfig

    sampling: Any = {"max_new_tokens": _MAX_NEW_TOKENS}
    if file is not None or preset is not None:
        name = f"preset {preset}" if preset is not None else str(file)
        return choose_config(file, preset).replace(sampling=sampling), name
    memory = {"selected_tokens": _SELECTED_TOKENS}
    config = SessionConfig.preset(_PRESET, memory=memory, sampling=sampling)
    return config, f"preset {_PRESET} with {_SELECTED_TOKENS} selected tokens"


def _counter(engine: Engine) -> Any:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _model(engine: Engine, policy: str) -> dict[str, Any]:
    import torch

    shape = engine.shape
    return {
        "name": "embedded office model",
        "parameters": sum(item.numel() for item in engine.model.parameters()),
        "layers": shape.num_layers,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": str(shape.device),
        "threads": torch.get_num_threads(),
        "policy": policy,
    }
