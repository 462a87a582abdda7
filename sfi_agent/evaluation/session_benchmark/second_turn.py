"""Turn 2 of a chat whose first prompt is long, beside the same messages without a past."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.session_benchmark.office_text import office_text
from sfi_agent.evaluation.session_benchmark.records import SecondTurn
from sfi_agent.evaluation.session_benchmark.stopwatch import Stopwatch
from sfi_agent.evaluation.session_benchmark.turn_clock import TimedTurn, timed_turn, turn_cost

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine
    from sfi_agent.session.session import Session

__all__ = ["DEFAULT_TURN_CONTEXT_TOKENS", "TurnPlan", "measure_second_turn", "plan_turn"]

DEFAULT_TURN_CONTEXT_TOKENS = 32768
_TEMPLATE_ROOM_TOKENS = 512
"""For both questions, what the chat template writes, and answers cut short."""
_FIRST_QUESTION = "Name the room of everybody who moved."
_SECOND_QUESTION = "And who is the manager of the first of them?"


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """How long the first prompt will be.

    Attributes:
        asked_tokens: What was asked for.
        prompt_tokens: What is aimed at.
        reason: Why that is less; "" where it is not.
    """

    asked_tokens: int
    prompt_tokens: int
    reason: str = ""


def plan_turn(asked_tokens: int | None, limit_tokens: int, turn_tokens: int) -> TurnPlan:
    """The length of the first prompt that a model takes.

    Args:
        asked_tokens: What was asked for; None takes the default, or less where the model takes
            less.
        limit_tokens: Positions of the model.
        turn_tokens: Most tokens of each of the two answers.

    Raises:
        InputError: The model does not take what was asked for, or nothing at all.
    """
    longest = limit_tokens - _TEMPLATE_ROOM_TOKENS - 2 * turn_tokens
    wanted = DEFAULT_TURN_CONTEXT_TOKENS if asked_tokens is None else asked_tokens
    takes = f"the model takes {limit_tokens:,} tokens, answers and questions among them"
    if longest < _TEMPLATE_ROOM_TOKENS or (asked_tokens is not None and wanted > longest):
        raise InputError(
            explain(
                "benchmarked turn 2 of a chat",
                got=f"a first prompt of {wanted:,} tokens",
                allowed=f"up to {max(0, longest):,}: {takes}",
                remedy="lower --turn-context, or name a model that takes more with --model",
            )
        )
    if wanted < _TEMPLATE_ROOM_TOKENS:
        raise InputError(
            explain(
                "benchmarked turn 2 of a chat",
                got=f"a first prompt of {wanted:,} tokens",
                allowed=f"{_TEMPLATE_ROOM_TOKENS:,} or more",
            )
        )
    if wanted <= longest:
        return TurnPlan(wanted, wanted)
    return TurnPlan(wanted, longest, takes)


def measure_second_turn(
    engine: Engine,
    model: str,
    config: SessionConfig,
    plan: TurnPlan,
    *,
    rounds: int,
    turn_tokens: int,
    seed: int,
    on_progress: Callable[[str], None],
) -> SecondTurn:
    """Play turn 1 once, and turn 2 in turns with the same messages in a new session.

    Raises:
        TemplateError: The tokenizer has no chat template.
    """
    engine.check_template()
    config = config.replace(sampling={"max_new_tokens": turn_tokens})
    watch = Stopwatch(engine.shape.device)
    prompt = f"{_text(engine, plan.prompt_tokens, seed)}\n\n{_FIRST_QUESTION}"
    with engine.session(config) as session:
        on_progress("turn 1")
        first = timed_turn(session, prompt, watch)
        kept, anew = _rounds(engine, session, config, watch, rounds, on_progress)
    return SecondTurn(
        model=model,
        threads=torch.get_num_threads(),
        context_limit_tokens=engine.shape.context_limit_tokens,
        asked_tokens=plan.asked_tokens,
        prompt_tokens=first.reply.usage.prompt_tokens,
        reason=plan.reason,
        first_turn_seconds=first.seconds,
        turn=turn_cost(kept),
        anew=turn_cost(anew),
    )


def _rounds(
    engine: Engine,
    session: Session,
    config: SessionConfig,
    watch: Stopwatch,
    rounds: int,
    on_progress: Callable[[str], None],
) -> tuple[list[TimedTurn], list[TimedTurn]]:
    """Turn 2 behind the history, and anew, after one of each that does not count."""
    kept: list[TimedTurn] = []
    anew: list[TimedTurn] = []
    question = {"role": "user", "content": _SECOND_QUESTION}
    messages = [*session.messages, question]
    for index in range(rounds + 1):
        said = f"round {index} of {rounds}" if index else "once for nothing"
        on_progress(f"{said}, turn 2")
        # A fork, not a rewind: a template that rewrites the past gives up what marks point to.
        with session.fork() as child:
            kept.append(timed_turn(child, question, watch))
        on_progress(f"{said}, everything anew")
        with engine.session(config) as fresh:
            anew.append(timed_turn(fresh, messages, watch))
    return kept[1:], anew[1:]


def _text(engine: Engine, tokens: int, seed: int) -> str:
    """A log of about so many tokens of the model's own tokenizer, and not more."""
    tokenizer: Any = engine.tokenizer

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    spare = count(_FIRST_QUESTION) + 32
    return office_text(tokens - spare, seed, count)
