"""Plays the demo: one conversation over an office log, decoded slow-fast and dense, turn by turn.

Both sessions get the same user messages and the same tools, whose results follow from their
arguments alone. Their turns alternate, so that drift of the machine hits both alike. Nothing is
printed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from sfi_agent.cli.step_marks import ShownToken
from sfi_agent.embedded import DEFAULT_SYSTEM, Case, Conversation, make_conversation, score
from sfi_agent.session.events import Step, ToolCall, ToolResult, TurnEnd
from sfi_agent.session.reply import FinishReason, Usage

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session
    from sfi_agent.session.stats import SessionStats

__all__ = [
    "Agreement",
    "AssistantTurn",
    "Demo",
    "DemoTurn",
    "PlayedTurn",
    "compare",
    "long_enough_conversation",
    "play",
]

_MAX_ASSISTANT_TURNS = 4
_KINDS = ("report", "tool", "chain", "attribute")
_LENGTH_TRIES = 6
_LENGTH_MARGIN = 1.01


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """What the model wrote in one go, and the tools that ran behind it.

    Attributes:
        tokens: Every generated token with its record, control tokens included.
        usage: Tokens of this turn.
        calls: The calls in it with their results, in order.
    """

    tokens: tuple[ShownToken, ...]
    usage: Usage
    calls: tuple[tuple[ToolCall, ToolResult], ...]


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """One user message answered by one session.

    Attributes:
        assistant_turns: The tool loop's turns; the last one holds the answer.
        text: The answer.
        finish_reason: Of the last turn.
        seconds: Wall-clock time of the whole loop, tools included.
        prefill_seconds: Of it, until each turn's first token: reading the new tokens.
        correct: Calls and answer are the expected ones.
    """

    assistant_turns: tuple[AssistantTurn, ...]
    text: str
    finish_reason: FinishReason
    seconds: float
    prefill_seconds: float
    correct: bool

    @property
    def tokens(self) -> list[ShownToken]:
        """All generated tokens."""
        return [token for turn in self.assistant_turns for token in turn.tokens]

    @property
    def decode_seconds(self) -> float:
        """What was left for the tokens after each turn's first."""
        return self.seconds - self.prefill_seconds

    @property
    def usage(self) -> Usage:
        """Tokens of all turns, added up."""
        total = Usage()
        for turn in self.assistant_turns:
            total = total + turn.usage
        return total


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two token sequences agree.

    Attributes:
        identical_tokens: Length of the common beginning.
        slow_fast_tokens, dense_tokens: Lengths of the two.
        same_answer: The answers are the same text.
    """

    identical_tokens: int
    slow_fast_tokens: int
    dense_tokens: int
    same_answer: bool

    @property
    def complete(self) -> bool:
        """Every token is identical."""
        return self.identical_tokens == self.slow_fast_tokens == self.dense_tokens


@dataclass(frozen=True, slots=True)
class DemoTurn:
    """One user message, its right answer, and both ways to decode.

    Attributes:
        user: The message.
        kind: Kind of the question; "open" for the first message, which has the log read.
        expected: The right answer; "" where any answer will do after the right call.
    """

    user: str
    kind: str
    expected: str
    slow_fast: PlayedTurn
    dense: PlayedTurn
    agreement: Agreement


@dataclass(slots=True)
class Demo:
    """Everything that was played.

    Attributes:
        conversation: Log and questions.
        log_tokens: Tokens of the log.
        config: The slow-fast policy.
        turns: In order.
        stats, dense_stats: Of the two sessions, at the end.
        seconds: From the first turn to the last, both sessions.
    """

    conversation: Conversation
    log_tokens: int
    config: SessionConfig
    turns: list[DemoTurn] = field(default_factory=list)
    stats: SessionStats | None = None
    dense_stats: SessionStats | None = None
    seconds: float = 0.0


def long_enough_conversation(
    seed: int, log_tokens: int, count: Callable[[str], int]
) -> tuple[Conversation, int]:
    """A conversation over a log of at least `log_tokens` tokens, and its true length.

    Logs are made to about a length; the aim is raised until the log is long enough.

    Args:
        seed: Of the conversation.
        log_tokens: Wanted length.
        count: Tokens of a text.

    Raises:
        InputError: No log of such a length can be made.
    """
    aim = log_tokens
    for _ in range(_LENGTH_TRIES):
        conversation = make_conversation(
            seed, log_tokens=aim, turns=len(_KINDS), kinds=_KINDS, count=lru_cache(count)
        )
        length = count(conversation.log)
        if length >= log_tokens:
            break
        aim = max(aim + 1, int(aim * log_tokens / length * _LENGTH_MARGIN))
    return conversation, length


def play(
    engine: Engine,
    demo: Demo,
    *,
    on_stage: Callable[[str], None],
    on_token: Callable[[int], None],
    on_turn: Callable[[DemoTurn], None],
) -> None:
    """Play every turn in both sessions and fill in the demo.

    Args:
        engine: The model.
        demo: Its conversation and policy; turns, statistics and time are written into it.
        on_stage: Told what begins.
        on_token: Told how many tokens the running turn has so far.
        on_turn: Given each turn when both sessions have played it.
    """
    conversation, tools = demo.conversation, demo.conversation.tools
    questions: list[Case | None] = [None, *conversation.turns]
    started = time.perf_counter()
    with (
        engine.session(demo.config, system=DEFAULT_SYSTEM, tools=tools) as slow_fast,
        engine.session(
            demo.config.replace(mode="dense"), system=DEFAULT_SYSTEM, tools=tools
        ) as dense,
    ):
        for number, case in enumerate(questions, start=1):
            user = case.question if case is not None else conversation.opening
            played = []
            for name, session in (("slow-fast", slow_fast), ("dense", dense)):
                on_stage(f"Turn {number} of {len(questions)}, {name}")
                played.append(_play_turn(session, user, _checker(conversation, case), on_token))
            kind, expected = (case.kind, case.expected) if case is not None else ("open", "")
            turn = DemoTurn(user, kind, expected, played[0], played[1], compare(*played))
            demo.turns.append(turn)
            on_turn(turn)
        demo.stats, demo.dense_stats = slow_fast.stats, dense.stats
    demo.seconds = time.perf_counter() - started


def compare(slow_fast: PlayedTurn, dense: PlayedTurn) -> Agreement:
    """How far the tokens and the answers of two sessions agree in one turn."""
    ours, theirs = (
        [token.record.token_id for token in played.tokens] for played in (slow_fast, dense)
    )
    identical = 0
    for first, second in zip(ours, theirs, strict=False):
        if first != second:
            break
        identical += 1
    return Agreement(identical, len(ours), len(theirs), slow_fast.text == dense.text)


Checker = Callable[[str, Sequence[tuple[ToolCall, ToolResult]]], bool]


def _checker(conversation: Conversation, case: Case | None) -> Checker:
    """Says whether an answer and the calls before it are the expected ones."""

    def opened(text: str, calls: Sequence[tuple[ToolCall, ToolResult]]) -> bool:
        return [result.content for _, result in calls] == [conversation.log]

    if case is None:
        return opened
    expected = [(use.name, dict(use.arguments)) for use in case.calls]

    def answered(text: str, calls: Sequence[tuple[ToolCall, ToolResult]]) -> bool:
        made = [(call.name, dict(call.arguments)) for call, _ in calls]
        return made == expected and score(case, text).exact

    return answered


def _play_turn(
    session: Session, user: str, is_correct: Checker, on_token: Callable[[int], None]
) -> PlayedTurn:
    tokenizer = session.engine.tokenizer
    assert tokenizer is not None
    control_ids = frozenset(tokenizer.all_special_ids)
    turns: list[_OpenTurn] = []
    prefill_seconds, generated, started = 0.0, 0, time.perf_counter()
    open_turn = _OpenTurn()
    for event in session.stream(user, max_turns=_MAX_ASSISTANT_TURNS):
        if isinstance(event, Step):
            if not open_turn.tokens:
                prefill_seconds += event.record.seconds
            generated += 1
            on_token(generated)
            is_control = event.token_id in control_ids
            open_turn.tokens.append(ShownToken(event.record, event.text, is_control))
        elif isinstance(event, ToolResult):
            turns[-1].results.append(event)
        elif isinstance(event, TurnEnd):
            open_turn.end = event
            turns.append(open_turn)
            open_turn = _OpenTurn()
    seconds = time.perf_counter() - started
    done = tuple(turn.finished() for turn in turns)
    last = turns[-1].end
    assert last is not None
    calls = [call for turn in done for call in turn.calls]
    return PlayedTurn(
        assistant_turns=done,
        text=last.reply.text,
        finish_reason=last.reply.finish_reason,
        seconds=seconds,
        prefill_seconds=prefill_seconds,
        correct=last.reply.finish_reason == "stop" and is_correct(last.reply.text, calls),
    )


@dataclass(slots=True)
class _OpenTurn:
    """An assistant turn while its events come in."""

    tokens: list[ShownToken] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    end: TurnEnd | None = None

    def finished(self) -> AssistantTurn:
        assert self.end is not None
        reply = self.end.reply
        by_id = {result.call_id: result for result in self.results}
        calls = [(call, by_id[call.id]) for call in reply.tool_calls if call.id in by_id]
        return AssistantTurn(tuple(self.tokens), reply.usage, tuple(calls))
