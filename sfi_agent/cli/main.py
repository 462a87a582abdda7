"""The command `sfi-agent`. Starting it, `--help` and `plugins` import no torch."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sfi_agent.cli.ablate_command import ablate
from sfi_agent.cli.bench_command import decode
from sfi_agent.cli.bench_kernels_command import kernels
from sfi_agent.cli.bench_sessions_command import sessions
from sfi_agent.cli.chat_command import chat
from sfi_agent.cli.demo_command import demo
from sfi_agent.cli.eval_command import evaluate
from sfi_agent.cli.output import LOG_LEVELS, events_on_stderr, print_error
from sfi_agent.cli.plugins_command import plugins
from sfi_agent.cli.warmup_command import warmup
from sfi_agent.errors import ConfigError, SfiError, explain

__all__ = ["app"]

USER_ERROR_STATUS = 2
SYSTEM_ERROR_STATUS = 1
_DEBUG_REMEDY = "`sfi-agent --debug COMMAND` says where"


class _Commands(TyperGroup):
    """Reports the errors of every command in one way."""

    def invoke(self, ctx: Any) -> Any:
        try:
            level = ctx.params.get("log_level", "warning")
            if level not in LOG_LEVELS:
                allowed = ", ".join(LOG_LEVELS)
                raise ConfigError(explain("set --log-level", got=repr(level), allowed=allowed))
            with events_on_stderr(level):
                return super().invoke(ctx)
        except SfiError as error:
            if ctx.params.get("debug"):
                raise
            print_error(error)
            raise typer.Exit(USER_ERROR_STATUS) from error
        except OSError as error:  # A full disk, say. Whoever closed the pipe wants no message.
            if ctx.params.get("debug") or error.errno == errno.EPIPE:
                raise
            print_error(explain("read or wrote a file", got=str(error), remedy=_DEBUG_REMEDY))
            raise typer.Exit(SYSTEM_ERROR_STATUS) from error


app = typer.Typer(
    name="sfi-agent",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Its boxes cut names of options off on narrow terminals.
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    no_args_is_help=True, help="Measure what steps and sessions cost on this machine."
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("sfi-agent")
        except PackageNotFoundError:
            number = "(imported from a folder, not installed)"
        typer.echo(f"sfi-agent {number}")
        raise typer.Exit()


@app.callback()
def sfi_agent(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    log_level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL", help=f"Which log events go to stderr: {', '.join(LOG_LEVELS)}."
        ),
    ] = "warning",
) -> None:
    """Slow-fast sparse decoding for agent loops on Hugging Face checkpoints."""


app.command(short_help="Play a session on the embedded model.")(demo)
app.command(short_help="Talk to a model over one lasting history.")(chat)
app.command(short_help="List detectors and selectors.")(plugins)
app.command("eval", short_help="Measure the distance to dense decoding.")(evaluate)
app.command(short_help="Play a grid of policies; write a report.")(ablate)
app.command(short_help="Compile and capture steps ahead of time.")(warmup)
bench.command(short_help="Time whole decodings and their steps.")(decode)
bench.command(short_help="Time the GPU kernels alone.")(kernels)
bench.command(short_help="Measure forks, rewinds, saves, turns.")(sessions)
app.add_typer(bench, name="bench", short_help="Measure what steps and sessions cost.")


@bench.callback()
def _bench() -> None:
    """Measure what steps and sessions cost on this machine."""
