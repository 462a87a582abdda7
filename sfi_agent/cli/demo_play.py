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

from sfi_agent.cli.demo_records import Agreement, AssistantTurn, Demo, DemoTurn, PlayedTurn
from sfi_agent.cli.step_marks import ShownToken
from sfi_agent.embedded import DEFAULT_SYSTEM, Case, Conversation, make_conversation, score
from sfi_agent.session.events import Step, ToolCall, ToolResult, TurnEnd

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["compare", "long_enough_conversation", "play"]

_MAX_ASSISTANT_TURNS = 4
_KINDS = ("report", "tool", "chain", "attribute")
_LENGTH_TRIES = 6
_LENGTH_MARGIN = 1.01


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
            seed,
            log_tokens=aim,
            turns=len(_KINDS),
            kinds=_KINDS,
            count=lru_cache(maxsize=None)(count),
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
