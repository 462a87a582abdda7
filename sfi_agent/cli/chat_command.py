"""`sfi-agent chat`: talk to a checkpoint over one persistent history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
from sfi_agent.cli.models import EMBEDDED, EMBEDDED_THREADS, cpu_threads, is_local, load_engine
from sfi_agent.cli.output import Progress, make_console

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["chat"]

_LOG_TOKENS = 2048
_FAILED_STATUS = 2


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"Directory or Hub id of a checkpoint, or '{EMBEDDED}'."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System prompt.", show_default=False)
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Longest answer; else what the policy says.",
        show_default=False,
    ),
]
ShowSteps = Annotated[
    bool, typer.Option("--show-steps", help="Mark slow and retried steps; with --json list steps.")
]


def chat(
    model: Model,
    config_file: ConfigFile = None,
    preset: PresetName = None,
    system: System = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = None,
    show_steps: ShowSteps = False,
    as_json: Json = False,
    color: Color = True,
) -> None:
    """Chat with a model: streamed answers over one history that is never read twice.

    Commands: /help, /stats, /undo, /save-config FILE, /quit. Ctrl-C ends the answer under way and
    keeps the session. With --json every line of stdin is a message, and every turn prints one
    line of JSON with reply, usage and stats. The embedded model brings an office log and tools.
    """
    config = choose_config(config_file, preset)
    if max_new_tokens is not None:
        config = config.replace(sampling={"max_new_tokens": max_new_tokens})
    with Progress(color=color) as progress:
        if is_local(model):
            progress.stage(f"Loading {model}")
        engine = load_engine(model, device=device, dtype=dtype)
        session, hint = _open_session(engine, model, config, system)
    with cpu_threads(EMBEDDED_THREADS if model == EMBEDDED else None), session:
        if as_json:
            from sfi_agent.cli.chat_lines import answer_lines

            if not answer_lines(session, with_steps=show_steps):
                raise typer.Exit(_FAILED_STATUS)
            return
        from sfi_agent.cli.chat_terminal import ChatTerminal

        terminal = ChatTerminal(session, make_console(color=color), show_steps=show_steps)
        terminal.greet(model, hint)
        terminal.run()


def _open_session(
    engine: Engine, model: str, config: SessionConfig, system: str | None
) -> tuple[Session, str]:
    """The session, and what to say first to the embedded model, which has a log and tools."""
    if model != EMBEDDED:
        return engine.session(config, system=system), ""
    from sfi_agent.embedded import DEFAULT_SYSTEM, make_conversation

    office = make_conversation(0, log_tokens=_LOG_TOKENS)
    prompt = DEFAULT_SYSTEM if system is None else system
    return engine.session(config, system=prompt, tools=office.tools), office.opening
