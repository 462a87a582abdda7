"""The demo as a screen to read: the conversation with marked steps, then the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sfi_agent.cli.demo_report import totals
from sfi_agent.cli.fitting_tables import fitting_tables
from sfi_agent.cli.quantities import bytes_text, count_text, seconds_text, share_text
from sfi_agent.cli.step_marks import STYLES, Glyphs, ReasonMarks, marked_lines
from sfi_agent.session.stats import SessionStats

if TYPE_CHECKING:
    from rich.console import Console

    from sfi_agent.cli.demo_records import AssistantTurn, Demo, DemoTurn, PlayedTurn
    from sfi_agent.session.events import ToolCall, ToolResult

__all__ = ["DemoScreen"]

_WIDEST_CELLS = 110
_LABEL_CELLS = 6
_RESULT_CHARACTERS = 60
_BAR_CELLS = 40
_BESIDE_BAR_CELLS = 36
"""Name, tokens and bytes beside a bar."""
_SPEEDUP_WORTH_NAMING = 1.2


class DemoScreen:
    """Prints the demo as it goes; every part is a method.

    Args:
        console: Where to print.
        demo: What is played; read when a part is printed.
        model: What is said about the model, as in the JSON document.
    """

    def __init__(self, console: Console, demo: Demo, model: dict[str, Any]) -> None:
        self._console = console
        self._demo = demo
        self._model = model
        self._width = min(console.width, _WIDEST_CELLS)
        self._glyphs = Glyphs.for_encoding(console.encoding)
        self._marks = ReasonMarks()

    def opening(self) -> None:
        """What is shown, on which model, under which policy, and how to read the marks."""
        model, config = self._model, self._demo.config
        memory = config.memory
        dense = ", ".join(str(layer) for layer in memory.dense_layers) or "none"
        grid = _labelled_rows()
        grid.add_row(
            "model",
            f"{model['name']}: {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} "
            f"layers, {model['dtype']} on {model['device']}, "
            f"{count_text(model['threads'], 'thread')}",
        )
        grid.add_row(
            "task",
            f"{len(self._demo.conversation.turns) + 1} turns over an office log of "
            f"{self._demo.log_tokens:,} tokens (seed {self._demo.conversation.seed}), with tools",
        )
        grid.add_row(
            "policy",
            f"{model['policy']}; selector {config.selector.name}, memory of {memory.sink_tokens} "
            f"sink, {memory.selected_tokens:,} selected and {memory.recent_tokens} recent tokens, "
            f"dense layers {dense}, slow step {config.slow_step}",
        )
        grid.add_row("marks", self._key_to_marks())
        self._print(Text("sfi-agent demo", style="bold"), grid)

    def _key_to_marks(self) -> Text:
        causes = ["prefill", *(entry.name for entry in self._demo.config.boundaries), "max_segment"]
        letters = ", ".join(f"{self._marks.letter(cause)} {cause}" for cause in causes)
        return Text.assemble(
            "below the first character of a token: nothing for a fast step, a ",
            ("CAPITAL", STYLES["slow"]),
            " for a slow step, a ",
            ("small", STYLES["retry"]),
            " letter for a fast step that was run again densely; ",
            f"{letters}; {self._glyphs.newline} newline, {self._glyphs.control} control token",
        )

    def turn(self, turn: DemoTurn) -> None:
        """One user message, all that followed, and how dense decoding compares."""
        number = len(self._demo.turns)
        grid = _labelled_rows()
        grid.add_row("user", Text(turn.user, style="bold"))
        for assistant in turn.slow_fast.assistant_turns:
            grid.add_row("model", Group(*self._marked(assistant)))
            grid.add_row("", self._usage(assistant))
            for call, result in assistant.calls:
                grid.add_row("tool", self._tool(call, result))
        grid.add_row("check", _verdict(turn.slow_fast, turn.expected))
        grid.add_row("dense", self._against_dense(turn))
        self._print(Rule(f" {number} {turn.kind} ", style="dim", align="left"), grid)

    def closing(self) -> None:
        """Numbers over all turns: time, memory, reasons, agreement."""
        # Tables of this style have an empty line above and below of their own.
        self._print(Rule(" all turns ", style="dim", align="left"))
        for table in self._turn_tables():
            self._print(table)
        self._print(*self._memory())
        self._print(self._reasons(), space=0)
        self._print(*self._conclusions(), space=0)

    def _print(self, *parts: RenderableType, space: int = 1) -> None:
        self._console.print(Padding(Group(*parts), (space, 0, 0, 0)), width=self._width)

    def _marked(self, turn: AssistantTurn) -> Iterator[Text]:
        width = self._width - _LABEL_CELLS - 2
        for line in marked_lines(turn.tokens, self._marks, width, self._glyphs):
            line.no_wrap, line.overflow = True, "crop"
            yield line

    def _usage(self, turn: AssistantTurn) -> Text:
        usage, stats = turn.usage, _stats(turn)
        text = (
            f"prompt {usage.prompt_tokens:,} = {usage.cached_tokens:,} cached + "
            f"{usage.prefilled_tokens:,} prefilled; {count_text(usage.output_tokens, 'token')} "
            f"written: {stats.fast_tokens} fast, {stats.slow_tokens} slow, "
            f"{stats.retry_tokens} retried"
        )
        if usage.reuse_lost_reason:
            text += f"; reuse lost: {usage.reuse_lost_reason}"
        return Text(text, style="dim")

    def _tool(self, call: ToolCall, result: ToolResult) -> Text:
        arguments = ", ".join(f"{key}={json.dumps(value)}" for key, value in call.arguments.items())
        content = result.content.replace("\n", self._glyphs.newline)
        if len(content) > _RESULT_CHARACTERS:
            rest = len(content) - _RESULT_CHARACTERS
            content = f"{content[:_RESULT_CHARACTERS]}... ({count_text(rest, 'more character')})"
        head = f"{call.name or call.raw_text}({arguments}) {self._glyphs.arrow} "
        return Text.assemble((head, "magenta"), (content, "red" if result.is_error else ""))

    def _against_dense(self, turn: DemoTurn) -> Text:
        agreement, dense = turn.agreement, turn.dense
        text = Text(style="dim")
        if agreement.complete:
            text.append(f"all {count_text(agreement.dense_tokens, 'token')} identical")
        else:
            text.append(
                f"identical for {agreement.identical_tokens} of {agreement.slow_fast_tokens} "
                f"tokens, {'same' if agreement.same_answer else 'another'} answer"
            )
        text.append(
            f"; decoding took {seconds_text(turn.slow_fast.decode_seconds)} slow-fast, "
            f"{seconds_text(dense.decode_seconds)} dense; the prefill "
            f"{seconds_text(turn.slow_fast.prefill_seconds)} and "
            f"{seconds_text(dense.prefill_seconds)}"
        )
        if not agreement.same_answer:
            text.append(f"\n{dense.text or '(no answer)'}", style="not dim")
        return text

    def _turn_tables(self) -> Iterator[Table]:
        total, stats = totals(self._demo), self._demo.stats
        assert stats is not None
        names = ("turn", "tokens", "slow share", "slow-fast", "dense", "identical", "answers")
        rows = [
            (
                f"{number} {turn.kind}",
                f"{turn.agreement.slow_fast_tokens}",
                share_text(_stats(*turn.slow_fast.assistant_turns).slow_share),
                seconds_text(turn.slow_fast.decode_seconds),
                seconds_text(turn.dense.decode_seconds),
                f"{turn.agreement.identical_tokens}",
                _answers(turn),
            )
            for number, turn in enumerate(self._demo.turns, start=1)
        ]
        of_all = (
            "all",
            f"{total['generated_tokens']}",
            share_text(stats.slow_share),
            seconds_text(total["decode_seconds"]),
            seconds_text(total["dense_decode_seconds"]),
            f"{total['identical_tokens']}",
            f"{total['correct_answers']} of {total['turns']} right",
        )
        rows.append(of_all)
        return fitting_tables(names, rows, self._width, left=("answers",), last_apart=True)

    def _memory(self) -> list[RenderableType]:
        stats, config = self._demo.stats, self._demo.config
        assert stats is not None
        memory_tokens = totals(self._demo)["memory_tokens"]
        largest = max(stats.history_tokens, memory_tokens, 1)
        rows = Table.grid(padding=(0, 2))
        rows.add_column()
        rows.add_column(no_wrap=True)
        rows.add_column(justify="right", no_wrap=True)
        rows.add_column(justify="right", no_wrap=True)
        sizes = (
            ("history", stats.history_tokens, stats.history_bytes),
            ("memory", memory_tokens, stats.memory_bytes),
        )
        cells = min(_BAR_CELLS, self._width - _BESIDE_BAR_CELLS)
        for name, tokens, size in sizes:
            filled = round(cells * tokens / largest)
            bar = self._glyphs.filled * filled + self._glyphs.empty * (cells - filled)
            rows.add_row(name, Text(bar, style="cyan"), f"{tokens:,} tokens", f"{bytes_text(size)}")
        dense = len(config.memory.dense_layers)
        sparse = self._model["layers"] - dense
        note = "A slow step reads the history, a fast step the memory"
        note += f" in {sparse} of {self._model['layers']} layers." if dense else "."
        return [rows, Text(note, style="dim")]

    def _reasons(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("mark", justify="left")
        table.add_column("times", justify="right")
        table.add_column("why the step was not fast")
        for mark, meaning, count in self._marks.legend():
            style = STYLES["retry" if mark.islower() else "slow"]
            table.add_row(Text(mark, style=style), f"{count}", meaning)
        return table

    def _conclusions(self) -> list[RenderableType]:
        total, stats = totals(self._demo), self._demo.stats
        assert stats is not None
        turns = total["turns"]
        speedup = total["dense_decode_seconds"] / max(total["decode_seconds"], 1e-9)
        lines = [
            f"{total['identical_tokens']} of {total['generated_tokens']} tokens are those of dense "
            f"decoding, {total['same_answers']} of {turns} answers are the same. Right: "
            f"{total['correct_answers']} slow-fast, {total['dense_correct_answers']} dense.",
            f"{stats.dense_passes} dense passes over the history for {stats.generated_tokens} "
            f"tokens: slow share {share_text(stats.slow_share)}. Decoding took "
            f"{seconds_text(total['decode_seconds'])} slow-fast and "
            f"{seconds_text(total['dense_decode_seconds'])} dense.",
        ]
        if speedup < _SPEEDUP_WORTH_NAMING:
            lines.append(
                "At this size most of a step is fixed cost and little of it reading the history; "
                "`sfi-agent bench decode` times the steps of a model of real size."
            )
        lines.append(f"Everything took {seconds_text(self._demo.seconds)} for both sessions.")
        return [Text(line) for line in lines]


def _labelled_rows() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right", width=_LABEL_CELLS, no_wrap=True)
    grid.add_column()
    return grid


def _stats(*turns: AssistantTurn) -> SessionStats:
    records = [token.record for turn in turns for token in turn.tokens]
    return SessionStats.of(records, history_tokens=0, history_bytes=0, memory_bytes=0)


def _verdict(played: PlayedTurn, expected: str) -> Text:
    if played.correct:
        return Text("right", style="green")
    text = Text("wrong", style="bold red")
    if expected:
        text.append(f"; expected: {expected}", style="not bold")
    return text


def _answers(turn: DemoTurn) -> str:
    ours, theirs = turn.slow_fast.correct, turn.dense.correct
    if ours == theirs:
        said = "right" if ours else "wrong"
        return said if turn.agreement.same_answer else f"{said}, differ"
    return "right, dense wrong" if ours else "wrong, dense right"
