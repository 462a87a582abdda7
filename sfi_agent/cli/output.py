"""What commands print, and where: results on stdout, everything else on stderr.

With `--json` stdout holds JSON alone; progress, warnings and errors always go to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from sfi_agent.errors import SfiError

__all__ = [
    "LOG_LEVELS",
    "Progress",
    "events_on_stderr",
    "make_console",
    "print_error",
    "print_json",
]

LOG_LEVELS = ("debug", "info", "warning", "error")


def make_console(*, color: bool = True, stderr: bool = False) -> Console:
    """A console on stdout or stderr that prints text as it is: no markup, no highlighting.

    Without a terminal rich leaves all styles out; `color=False` leaves colours out everywhere.
    """
    from rich.console import Console

    return Console(
        stderr=stderr, no_color=None if color else True, markup=False, highlight=False, emoji=False
    )


def print_json(value: object, *, one_line: bool = False) -> None:
    """One JSON document on stdout, flushed."""
    text = json.dumps(
        value, indent=None if one_line else 2, ensure_ascii=False, allow_nan=False, default=_plain
    )
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_error(error: SfiError | str) -> None:
    """One clean message on stderr, without a traceback."""
    print(f"sfi-agent: {error}", file=sys.stderr)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON data")


class Progress:
    """Says on stderr what is going on: one changing line on a terminal, else a line per stage.

    Use as a context manager; `stage` starts something, `detail` adds how far it is, `pause`
    takes the line away so that results can be printed.
    """

    def __init__(self, *, color: bool = True) -> None:
        self._console = make_console(color=color, stderr=True)
        self._status: Status | None = None
        self._stage = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def stage(self, text: str) -> None:
        """A new stage begins."""
        self._stage = text
        if not self._console.is_terminal:
            self._console.print(f"{text} ...", soft_wrap=True)
            return
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def detail(self, text: str) -> None:
        """How far the stage is; only a terminal shows it."""
        if self._status is not None:
            self._status.update(f"{self._stage} ({text})")

    def pause(self) -> None:
        """Take the line away until the next stage."""
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextmanager
def events_on_stderr(level: str) -> Iterator[None]:
    """Log events of the package as lines on stderr while a command runs.

    A program that configured structlog itself and calls the commands keeps its configuration.
    """
    if structlog.is_configured():
        yield
        return
    structlog.configure(
        processors=[structlog.processors.add_log_level, _as_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.reset_defaults()


def _as_line(_logger: Any, _method: str, event: structlog.typing.EventDict) -> str:
    level, name = event.pop("level"), event.pop("event")
    values = ", ".join(f"{key} {value}" for key, value in event.items() if value is not None)
    return f"sfi-agent: {level}: {name}: {values}" if values else f"sfi-agent: {level}: {name}"
