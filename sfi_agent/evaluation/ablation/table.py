"""The table of an ablation: one row per policy, task, context length and protocol."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.evaluation.ablation.policy import Policy
from sfi_agent.evaluation.ablation.stretches import row_stretches
from sfi_agent.evaluation.ablation.units import RunKey

__all__ = ["COLUMNS", "csv_rows", "table_rows"]

_SUMS = (
    "right",
    "parts",
    "generated_tokens",
    "fast_tokens",
    "slow_tokens",
    "retry_tokens",
    "dense_passes",
    "drafted_tokens",
    "accepted_tokens",
)
_POLICY_COLUMNS = (
    "preset",
    "mode",
    "boundaries",
    "selector",
    "slow_step",
    "sink_tokens",
    "selected_tokens",
    "recent_tokens",
    "dense_layers",
    "min_segment_tokens",
    "max_segment_tokens",
    "settings",
)
_NUMBER_COLUMNS = (
    "cases",
    "seeds",
    "failed",
    "right",
    "parts",
    "share",
    "share_low",
    "share_high",
    "answers_given",
    "exact",
    "exact_share",
    "exact_low",
    "exact_high",
    "slow_share",
    "acceptance",
    "retries",
    "generated_tokens",
    "fast_tokens",
    "slow_tokens",
    "retry_tokens",
    "dense_passes",
    "drafted_tokens",
    "accepted_tokens",
    "memory_tokens_mean",
    "agreed_tokens_median",
    "agreed_share",
    "seconds_per_token",
)
_KEY_COLUMNS = ("task", "context_tokens", "protocol", "answers")
COLUMNS = ("policy", *_POLICY_COLUMNS, *_KEY_COLUMNS, *_NUMBER_COLUMNS)
"""Columns of `results.csv`, in order."""


def table_rows(
    policies: Sequence[Policy], runs: Mapping[RunKey, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows, policies in their order; numbers are None where every run failed.

    Intervals are Wilson's at 95 %, over all parts (or answers) together: parts of one answer
    are not independent, so the truth may lie outside more often than one time in twenty.
    """
    groups: dict[tuple[Any, ...], list[tuple[RunKey, Mapping[str, Any]]]] = defaultdict(list)
    for key, run in runs.items():
        case = key.case
        group = (case.task, case.context_tokens, case.protocol, case.answers, key.policy)
        groups[group].append((key, run))
    places = list(dict.fromkeys(group[:4] for group in groups))
    by_name = {policy.name: policy for policy in policies}
    return [
        {
            "policy": name,
            **dict(zip(_KEY_COLUMNS, place, strict=True)),
            "selected_tokens": policy.parts()["selected_tokens"],
            **_numbers(groups[(*place, name)]),
            "stretches": row_stretches(_done(groups[(*place, name)]), runs),
        }
        for place in places
        for name, policy in by_name.items()
        if (*place, name) in groups
    ]


def csv_rows(policies: Sequence[Policy], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the parts of their policies in columns, as `results.csv` has them."""
    parts = {policy.name: policy.parts() for policy in policies}
    return [{name: {**parts[row["policy"]], **row}.get(name) for name in COLUMNS} for row in rows]


def _numbers(found: Sequence[tuple[RunKey, Mapping[str, Any]]]) -> dict[str, Any]:
    done = _done(found)
    turns = [turn for _, run in done for turn in run["turns"]]
    counts = {
        "cases": len(done),
        "seeds": len({key.case.seed for key, _ in done}),
        "failed": len(found) - len(done),
    }
    if not turns:
        empty: dict[str, Any] = dict.fromkeys(_NUMBER_COLUMNS)
        return {**empty, **counts, "reasons": None}
    sums = {name: sum(turn[name] for turn in turns) for name in _SUMS}
    exact = sum(turn["exact"] for turn in turns)
    return {
        **counts,
        **sums,
        **_share("share", sums["right"], sums["parts"]),
        "answers_given": len(turns),
        "exact": exact,
        **_share("exact", exact, len(turns), name="exact_share"),
        "slow_share": _ratio(sums["dense_passes"], sums["generated_tokens"]),
        "acceptance": _ratio(sums["accepted_tokens"], sums["drafted_tokens"]),
        "retries": sums["retry_tokens"],
        "memory_tokens_mean": _memory_mean(turns),
        "agreed_tokens_median": float(median(turn["agreed_tokens"] for turn in turns)),
        "agreed_share": sum(turn["agreed"] for turn in turns) / len(turns),
        "seconds_per_token": _ratio(
            sum(turn["seconds"] for turn in turns), sums["generated_tokens"]
        ),
        "reasons": _reasons(turns),
    }


def _done(
    found: Sequence[tuple[RunKey, Mapping[str, Any]]],
) -> list[tuple[RunKey, Mapping[str, Any]]]:
    return [(key, run) for key, run in found if run["status"] == "done"]


def _share(prefix: str, right: int, total: int, name: str = "share") -> dict[str, float | None]:
    low, high = wilson_interval(right, total)
    return {name: _ratio(right, total), f"{prefix}_low": low, f"{prefix}_high": high}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _memory_mean(turns: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over fast steps; None where there was none."""
    seen = [turn for turn in turns if turn["memory_tokens_mean"] is not None]
    steps = sum(turn["fast_tokens"] for turn in seen)
    total = sum(turn["memory_tokens_mean"] * turn["fast_tokens"] for turn in seen)
    return _ratio(total, steps)


def _reasons(turns: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for turn in turns:
        counts.update(turn["reasons"])
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
