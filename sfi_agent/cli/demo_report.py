"""The demo as plain data, with the field names of Usage, SessionStats and StepRecord."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfi_agent.cli.demo_records import Demo, DemoTurn, PlayedTurn

__all__ = ["demo_json", "totals"]


def demo_json(demo: Demo, model: dict[str, Any]) -> dict[str, Any]:
    """The whole demo as one JSON document.

    Args:
        demo: What was played.
        model: What is said about the model.
    """
    conversation = demo.conversation
    assert demo.stats is not None and demo.dense_stats is not None
    return {
        "model": model,
        "seed": conversation.seed,
        "log_tokens": demo.log_tokens,
        "config": demo.config.resolved(),
        "turns": [_turn(turn) for turn in demo.turns],
        "stats": asdict(demo.stats),
        "dense_stats": asdict(demo.dense_stats),
        "totals": totals(demo),
        "seconds": demo.seconds,
    }


def totals(demo: Demo) -> dict[str, Any]:
    """Numbers over all turns: agreement, right answers, seconds.

    The memory of a fast step is given per layer that has one; dense layers read the history.
    """
    turns = demo.turns
    fast = [
        token.record.memory_tokens
        for turn in turns
        for token in turn.slow_fast.tokens
        if token.record.kind == "fast"
    ]
    return {
        "turns": len(turns),
        "generated_tokens": sum(turn.agreement.slow_fast_tokens for turn in turns),
        "identical_tokens": sum(turn.agreement.identical_tokens for turn in turns),
        "same_answers": sum(turn.agreement.same_answer for turn in turns),
        "correct_answers": sum(turn.slow_fast.correct for turn in turns),
        "dense_correct_answers": sum(turn.dense.correct for turn in turns),
        "memory_tokens": max(fast, default=0),
        "prefill_seconds": sum(turn.slow_fast.prefill_seconds for turn in turns),
        "decode_seconds": sum(turn.slow_fast.decode_seconds for turn in turns),
        "dense_prefill_seconds": sum(turn.dense.prefill_seconds for turn in turns),
        "dense_decode_seconds": sum(turn.dense.decode_seconds for turn in turns),
    }


def _turn(turn: DemoTurn) -> dict[str, Any]:
    return {
        "user": turn.user,
        "kind": turn.kind,
        "expected": turn.expected,
        "agreement": asdict(turn.agreement),
        "slow_fast": _played(turn.slow_fast),
        "dense": _played(turn.dense),
    }


def _played(played: PlayedTurn) -> dict[str, Any]:
    return {
        "text": played.text,
        "correct": played.correct,
        "finish_reason": played.finish_reason,
        "usage": asdict(played.usage),
        "seconds": played.seconds,
        "prefill_seconds": played.prefill_seconds,
        "decode_seconds": played.decode_seconds,
        "assistant_turns": [
            {
                "usage": asdict(turn.usage),
                "tool_calls": [
                    {
                        "name": call.name,
                        "arguments": dict(call.arguments),
                        "result": result.content,
                        "is_error": result.is_error,
                    }
                    for call, result in turn.calls
                ],
                "steps": [{**asdict(token.record), "text": token.text} for token in turn.tokens],
            }
            for turn in played.assistant_turns
        ],
    }
