"""Where in long answers policies go wrong: parts and lengths by stretch, per run and summed up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.evaluation.ablation.policy import DENSE
from sfi_agent.evaluation.ablation.units import RunKey

if TYPE_CHECKING:
    from sfi_agent.evaluation.play import CaseRun
    from sfi_agent.evaluation.tasks import Case, TokenCounter

__all__ = ["STRETCH_TOKENS", "row_stretches", "run_stretches"]

STRETCH_TOKENS = 1000
"""Length of a stretch, in tokens of the right answers. Stored runs are summed by where their
stretches begin, so another length is another format of the folder."""

_Run = Mapping[str, Any]


def run_stretches(case: Case, run: CaseRun, count_tokens: TokenCounter) -> list[dict[str, int]]:
    """What is stored of one run, stretch by stretch of the right answers.

    Args:
        case: What was asked; its task judges the parts.
        run: What one policy answered.
        count_tokens: How the model's tokenizer counts.

    Returns:
        Per stretch that holds parts, in order: `first_token` (where it begins), `right` and
        `parts` (higher `right` is better), `output_tokens` (of the answers that begin in it).
    """
    from sfi_agent.evaluation.tasks import scores_by_position, task_named

    scores = scores_by_position(
        task_named(case.task),
        case,
        [turn.output for turn in run.turns],
        count_tokens,
        bucket_tokens=STRETCH_TOKENS,
    )
    return [
        {
            "first_token": score.first_token,
            "right": score.right,
            "parts": score.parts,
            "output_tokens": score.output_tokens,
        }
        for score in scores
    ]


def row_stretches(
    done: Sequence[tuple[RunKey, _Run]], runs: Mapping[RunKey, _Run]
) -> list[dict[str, Any]] | None:
    """The stretches of one row of the table, summed over its cases.

    Args:
        done: The row's finished runs.
        runs: All runs; those of mode dense on the same cases are looked up here.

    Returns:
        Per stretch: the sums of the runs, `share` with its 95 % Wilson interval, and
        `dense_output_tokens`, those of mode dense on the same cases (None where one of these runs
        is missing, failed or was stored without stretches). None in place of the list where there
        is no finished run, or one was stored without stretches: a sum over the others would be
        of other cases than the row.
    """
    own = _stored(run for _, run in done)
    if not own:
        return None
    dense = _stored(runs.get(RunKey(key.case, DENSE)) for key, _ in done)
    sums = _sums(own)
    lengths = None if dense is None else _sums(dense)
    return [
        {
            "first_token": first,
            "right": total["right"],
            "parts": total["parts"],
            **_share(total["right"], total["parts"]),
            "output_tokens": total["output_tokens"],
            "dense_output_tokens": None if lengths is None else lengths[first]["output_tokens"],
        }
        for first, total in sorted(sums.items())
    ]


def _stored(runs: Iterable[_Run | None]) -> list[list[dict[str, int]]] | None:
    """The stretches of each run; None where a run has none."""
    found = []
    for run in runs:
        stretches = run.get("stretches") if run is not None and run["status"] == "done" else None
        if stretches is None:
            return None
        found.append(stretches)
    return found


def _sums(found: Sequence[Sequence[Mapping[str, int]]]) -> dict[int, dict[str, int]]:
    sums: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for stretches in found:
        for stretch in stretches:
            for name in ("right", "parts", "output_tokens"):
                sums[stretch["first_token"]][name] += stretch[name]
    return sums


def _share(right: int, parts: int) -> dict[str, float]:
    low, high = wilson_interval(right, parts)
    return {"share": right / parts, "share_low": low, "share_high": high}
