"""What is stored of a run: counts per answer, and the answer itself."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import SfiError
from sfi_agent.evaluation.ablation.store import FORMAT

if TYPE_CHECKING:
    from sfi_agent.evaluation.ablation.units import RunKey
    from sfi_agent.evaluation.play import CaseRun, TurnRun
    from sfi_agent.evaluation.tasks import Case, Turn
    from sfi_agent.observe.trace import StepRecord

__all__ = ["failed_run", "finished_run", "reason_counts"]


def finished_run(
    key: RunKey,
    case: Case,
    run: CaseRun,
    dense: CaseRun,
    stretches: Sequence[Mapping[str, int]],
) -> dict[str, Any]:
    """The document of a run that came to its end.

    Args:
        key: Which run it is.
        case: What was asked.
        run: What the policy answered.
        dense: The reference on the same case.
        stretches: The run by stretches of the right answers, from `run_stretches`.
    """
    turns = [
        _turn(turn, played, played.output_ids == reference.output_ids)
        for turn, played, reference in zip(case.turns, run.turns, dense.turns, strict=True)
    ]
    return {
        "format": FORMAT,
        **key.as_json(),
        "status": "done",
        "error": None,
        "turns": turns,
        "stretches": [dict(stretch) for stretch in stretches],
    }


def failed_run(key: RunKey, error: Exception) -> dict[str, Any]:
    """The document of a run that an error ended.

    Errors of ours say everything in their message; of others the traceback is kept as well.
    """
    found = {"type": type(error).__name__, "message": str(error)}
    if not isinstance(error, SfiError):
        found["traceback"] = "".join(traceback.format_exception(error))
    return {
        "format": FORMAT,
        **key.as_json(),
        "status": "failed",
        "error": found,
        "turns": [],
    }


def reason_counts(steps: Sequence[StepRecord]) -> dict[str, int]:
    """How often each reason made a step slow; most frequent first."""
    counts = Counter(step.reason for step in steps if step.kind != "fast")
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _turn(turn: Turn, played: TurnRun, agreed: bool) -> dict[str, Any]:
    steps = played.steps
    kinds = Counter(step.kind for step in steps)
    memory = [step.memory_tokens for step in steps if step.kind == "fast"]
    generated = len(played.output_ids)
    return {
        "question": turn.question,
        "answer_prefix": turn.answer_prefix,
        "references": list(turn.references),
        "output": played.output,
        "right": played.score.right,
        "parts": played.score.parts,
        "exact": played.score.exact,
        "generated_tokens": generated,
        "fast_tokens": kinds["fast"],
        "slow_tokens": kinds["slow"],
        "retry_tokens": kinds["retry"],
        "dense_passes": played.dense_passes,
        "drafted_tokens": played.drafted_tokens,
        "accepted_tokens": played.accepted_tokens,
        "memory_tokens_mean": sum(memory) / len(memory) if memory else None,
        "agreed_tokens": played.agreed_tokens,
        "agreed": agreed,
        "seconds": played.seconds,
        "reasons": reason_counts(steps),
    }
