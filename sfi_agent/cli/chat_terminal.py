"""The interactive chat: a prompt, streamed answers, and commands that start with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sfi_agent.cli.interrupts import ctrl_c_cancels
from sfi_agent.cli.output import print_error
from sfi_agent.cli.quantities import bytes_text, seconds_text, share_text
from sfi_agent.cli.step_marks import STYLES, ReasonMarks
from sfi_agent.errors import SfiError
from sfi_agent.session.events import (
    Event,
    ReasoningDelta,
    Step,
    TextDelta,
    ToolCall,
    ToolResult,
    TurnEnd,
)
from sfi_agent.session.reply import Usage

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.observe.trace import StepRecord
    from sfi_agent.session.marks import Mark
    from sfi_agent.session.session import Session

__all__ = ["ChatTerminal"]

_PROMPT = "> "
_RESULT_CHARACTERS = 200


class ChatTerminal:
    """Reads messages and commands until /quit or the end of the input.

    Args:
        session: Answers; stays open.
        console: Where answers are printed; the prompt goes where `input` puts it.
        show_steps: Print the raw text with a mark in front of each token of a slow step.
    """

    def __init__(self, session: Session, console: Console, *, show_steps: bool) -> None:
        self._session = session
        self._console = console
        self._show_steps = show_steps
        self._marks = ReasonMarks()
        self._before_turns: list[Mark] = []
        self._usage = Usage()
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("list the commands", self._help),
            "/stats": ("tokens, slow share and bytes so far", self._stats),
            "/undo": ("take back the last message and its answer", self._undo),
            "/save-config": ("write the policy to a .yaml or .json FILE", self._save_config),
            "/quit": ("end the chat, as the end of the input does", self._quit),
        }
        self._running = True
        self._line_is_open = False

    def greet(self, model: str, hint: str = "") -> None:
        """Say what is running and how to get help."""
        config = self._session.config
        names = ", ".join(entry.name for entry in config.boundaries)
        policy = f"boundaries {names}; selector {config.selector.name}"
        self._console.print(f"{model}, {policy if config.mode == 'slow_fast' else 'mode dense'}")
        self._console.print("/help lists the commands, Ctrl-C ends an answer.", style="dim")
        if hint:
            self._console.print(f"It has one office log and tools; try: {hint}", style="dim")

    def run(self) -> None:
        """Read and answer until the end."""
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history, where Python was built with it)
        while self._running:
            try:
                line = input(_PROMPT)
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print("\n/quit ends the chat.", style="dim")
                continue
            try:
                self._handle(line)
            except SfiError as error:
                print_error(error)

    def _handle(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            known = ", ".join(self._commands)
            self._console.print(
                f"There is no command {name}. Known: {known}. A space in front sends it as text."
            )
            return
        self._commands[name][1](argument.strip())

    def _answer(self, message: str) -> None:
        before = self._session.mark()
        past = list(self._session.token_ids)
        try:
            with ctrl_c_cancels(self._session):
                for event in self._session.stream(message):
                    self._show(event)
        finally:
            self._end_line()
            if self._session.token_ids != past:
                self._before_turns.append(before)

    def _show(self, event: Event) -> None:
        if isinstance(event, Step):
            if self._show_steps:
                self._show_step(event)
        elif isinstance(event, ToolCall):
            if not self._show_steps:
                given = json.dumps(dict(event.arguments), ensure_ascii=False)
                self._line(f"[calls {event.name or event.raw_text} {given}]", "magenta")
        elif isinstance(event, ToolResult):
            text = event.content.replace("\n", " ")
            cut = f"{text[:_RESULT_CHARACTERS]}..." if len(text) > _RESULT_CHARACTERS else text
            self._line(f"[{event.name} says {cut}]", "red" if event.is_error else "magenta")
        elif isinstance(event, TurnEnd):
            self._end_turn(event)
        elif isinstance(event, (TextDelta, ReasoningDelta)) and not self._show_steps:
            self._show_text(event)

    def _show_text(self, event: TextDelta | ReasoningDelta) -> None:
        style = "dim italic" if isinstance(event, ReasoningDelta) else ""
        self._open_line(Text(event.text, style=style))

    def _show_step(self, event: Step) -> None:
        mark = self._marks.mark(event.record)
        style = STYLES[event.record.kind]
        # The mark stands before the word, not before the space that begins its token.
        text = event.text.lstrip(" ")
        shown = Text(" " * (len(event.text) - len(text)))
        shown.append(f"[{mark}]" if mark else "", "dim").append(text, style)
        self._open_line(shown)

    def _end_turn(self, event: TurnEnd) -> None:
        reply = event.reply
        self._usage = self._usage + reply.usage
        self._end_line()
        if reply.finish_reason == "cancelled":
            kept = "what was written stays" if reply.steps else "the message was taken back"
            self._line(f"(cancelled; {kept})", "yellow")
        elif reply.finish_reason in ("length", "max_turns"):
            limit = "the answer's token limit" if reply.finish_reason == "length" else "turn limit"
            self._line(f"(ended by {limit})", "yellow")
        if self._show_steps and reply.steps:
            self._line(_steps_line(reply.steps, reply.usage), "dim")

    def _open_line(self, text: Text) -> None:
        self._console.print(text, end="", soft_wrap=True)
        self._line_is_open = self._line_is_open or bool(text)

    def _end_line(self) -> None:
        if self._line_is_open:
            self._console.print()
        self._line_is_open = False

    def _line(self, text: str, style: str) -> None:
        self._end_line()
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _help(self, _argument: str) -> None:
        grid = Table.grid(padding=(0, 2))
        for name, (meaning, _) in self._commands.items():
            grid.add_row(name, meaning)
        self._console.print(grid)

    def _stats(self, _argument: str) -> None:
        stats, usage = self._session.stats, self._usage
        grid = Table.grid(padding=(0, 2))
        rows = {
            "tokens": f"{stats.generated_tokens} written: {stats.fast_tokens} fast, "
            f"{stats.slow_tokens} slow, {stats.retry_tokens} retried",
            "slow share": f"{share_text(stats.slow_share)} ({stats.dense_passes} dense passes)",
            "prompts": f"{usage.prompt_tokens:,} = {usage.cached_tokens:,} cached + "
            f"{usage.prefilled_tokens:,} prefilled, over all turns",
            "history": f"{stats.history_tokens:,} tokens, {bytes_text(stats.history_bytes)}",
            "memory": bytes_text(stats.memory_bytes),
        }
        if stats.acceptance is not None:
            rows["acceptance"] = share_text(stats.acceptance)
        for name, text in rows.items():
            grid.add_row(name, text)
        self._console.print(grid)
        for mark, meaning, count in self._marks.legend():
            self._line(f"[{mark}] {count} x {meaning}", "dim")

    def _undo(self, _argument: str) -> None:
        if not self._before_turns:
            self._console.print("There is nothing to undo.")
            return
        mark = self._before_turns.pop()
        self._session.rewind(mark)
        self._console.print(f"Back at {mark.token_count:,} tokens.")

    def _save_config(self, argument: str) -> None:
        if not argument:
            self._console.print("Say where: /save-config policy.yaml")
            return
        self._console.print(f"Wrote {self._session.config.save(argument)}.", soft_wrap=True)

    def _quit(self, _argument: str) -> None:
        self._running = False


def _steps_line(steps: tuple[StepRecord, ...], usage: Usage) -> str:
    kinds = [record.kind for record in steps]
    seconds = sum(record.seconds for record in steps)
    return (
        f"({usage.cached_tokens:,} cached + {usage.prefilled_tokens:,} prefilled; "
        f"{kinds.count('fast')} fast, {kinds.count('slow')} slow, {kinds.count('retry')} retried; "
        f"{seconds_text(seconds)})"
    )
