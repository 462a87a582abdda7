"""What keeping sessions was to cost, written down before it was measured."""

from __future__ import annotations

from collections.abc import Mapping

from sfi_agent.evaluation.session_benchmark.records import (
    SaveCost,
    SecondTurn,
    Target,
    Timing,
    TurnCost,
)

__all__ = ["targets_of"]

_QUICK_SECONDS = 0.005
"""Of a fork or a rewind, whatever the length of the session."""
_QUICK_ARMS = ("fork", "fork_policy", "fork_nested", "rewind_near", "rewind_far", "rewind_inside")
_LEAST_SHARE_OF_WRITE = 0.7


def targets_of(
    times: Mapping[str, Timing],
    save: SaveCost | None,
    long_turn: TurnCost | None,
    second_turn: SecondTurn | None,
) -> dict[str, Target]:
    """Targets of what was measured, by arm."""
    found = {
        arm: Target(_QUICK_SECONDS, "seconds", times[arm].median_seconds)
        for arm in _QUICK_ARMS
        if arm in times
    }
    if save is not None:
        found["save"] = Target(
            _LEAST_SHARE_OF_WRITE, "share", save.share_of_write, higher_is_better=True
        )
    turns = {"long_turn": long_turn, "turn": second_turn.turn if second_turn else None}
    for name, turn in turns.items():
        if turn is not None:
            found[name] = Target(turn.new_tokens, "tokens", turn.usage.prefilled_tokens)
    return found
