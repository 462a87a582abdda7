"""What the page carries as data, and what it leaves out to stay of bounded size.

Nothing is computed here that the folder does not hold: shares and intervals are derived on the
page from the counts, so that they follow its filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sfi_agent.evaluation.report.folder import Folder
from sfi_agent.evaluation.report.folder_format import RecallFile, Refresh, Run, Trace
from sfi_agent.evaluation.report.runs_code import pack_runs

__all__ = ["Limits", "page_data", "trace_data"]

_STEP_KINDS = ("fast", "slow", "retry")
_EVIDENT_CONTEXT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the page may carry; what goes beyond is left out and named on the page.

    Attributes:
        history_tokens: Token texts per trace. Of longer histories the beginning, the end and the
            surroundings of selected tokens are kept.
        head_tokens: How many tokens of the beginning are always kept.
        tail_tokens: How many tokens of the end are always kept, the answer's among them.
        selection_characters: Packed selections of all traces together; beyond it every trace
            keeps fewer refreshes, evenly spread.
        answer_characters: Question, references and output of a trace, each.
    """

    history_tokens: int = 32_768
    head_tokens: int = 512
    tail_tokens: int = 4_096
    selection_characters: int = 12_000_000
    answer_characters: int = 20_000


def page_data(folder: Folder) -> dict[str, Any]:
    """Policies, rows and recall, as the page's scripts read them."""
    results = folder.results
    numbers = {policy.name: index for index, policy in enumerate(results.policies)}
    return {
        "policies": [policy.model_dump() for policy in results.policies],
        "rows": [
            {"policy": numbers[row.policy], **row.model_dump(exclude={"policy"})}
            for row in results.rows
        ],
        "stretch_tokens": results.stretch_tokens,
        "recall": _recall_data(folder.recall, numbers),
        "traces": [
            {
                "id": trace.id,
                "policy": numbers[trace.policy],
                **{
                    name: getattr(trace, name)
                    for name in ("task", "context_tokens", "protocol", "answers", "seed", "case")
                },
            }
            for trace in folder.traces
        ],
    }


def trace_data(traces: Sequence[Trace], limits: Limits) -> list[dict[str, Any]]:
    """The token views, one entry per trace.

    Args:
        traces: In the order of the page.
        limits: How much to carry.
    """
    packed = [[_refresh_data(refresh) for refresh in trace.refreshes] for trace in traces]
    kept = _fit_refreshes(packed, limits.selection_characters)
    return [_one_trace(trace, chosen, limits) for trace, chosen in zip(traces, kept, strict=True)]


def _recall_data(recall: RecallFile | None, numbers: dict[str, int]) -> dict[str, Any] | None:
    if recall is None:
        return None
    return {
        "task": recall.task,
        "context_tokens": recall.context_tokens,
        "seed": recall.seed,
        "case": recall.case,
        "policies": [
            {
                "policy": numbers[name],
                "fast_steps": entry.fast_steps,
                "mean": entry.mean,
                "reason": entry.reason,
                "layers": None if entry.layers is None else [_rounded(row) for row in entry.layers],
            }
            for name, entry in recall.policies.items()
        ],
    }


def _rounded(heads: list[float] | None) -> list[float] | None:
    return None if heads is None else [round(value, 4) for value in heads]


def _refresh_data(refresh: Refresh) -> dict[str, Any]:
    return {
        "history_tokens": refresh.history_tokens,
        "step": refresh.step,
        "heads_total": refresh.selected_heads_total,
        "layers_total": refresh.layers_total,
        "union": pack_runs(refresh.union),
        "layers": {str(layer): pack_runs(runs) for layer, runs in sorted(refresh.layers.items())},
    }


def _fit_refreshes(
    packed: list[list[dict[str, Any]]], characters: int
) -> list[list[dict[str, Any]]]:
    """Thin the refreshes of every trace alike until all together fit."""
    share = 1.0
    kept = packed
    while sum(_characters(refreshes) for refreshes in kept) > characters:
        share *= 0.75
        kept = [_evenly(refreshes, int(len(refreshes) * share)) for refreshes in packed]
        if not any(kept):
            break
    return kept


def _characters(refreshes: Iterable[dict[str, Any]]) -> int:
    return sum(
        len(refresh["union"]) + sum(map(len, refresh["layers"].values())) for refresh in refreshes
    )


def _evenly(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` items, the first and the last among them."""
    if count >= len(items):
        return items
    if count < 2:
        return items[:count]
    last = len(items) - 1
    return [items[round(index * last / (count - 1))] for index in range(count)]


def _one_trace(trace: Trace, refreshes: list[dict[str, Any]], limits: Limits) -> dict[str, Any]:
    reasons = list(dict.fromkeys(step.reason for step in trace.steps))
    clipped = limits.answer_characters
    return {
        **{
            name: getattr(trace, name)
            for name in (
                *("right", "parts", "exact", "num_layers", "kv_heads", "dense_layers"),
                *("sink_tokens", "recent_tokens", "selected_tokens", "prompt_tokens"),
            )
        },
        "question": trace.question[-clipped:],
        "references": [text[:clipped] for text in trace.references],
        "output": trace.output[:clipped],
        "history_tokens": len(trace.tokens),
        "texts": _kept_texts(trace, limits),
        "reasons": reasons,
        "steps": [
            [
                step.position,
                _STEP_KINDS.index(step.kind),
                reasons.index(step.reason),
                step.memory_tokens,
                step.segment_tokens,
                round(step.seconds, 6),
                step.drafted_tokens,
                step.accepted_tokens,
            ]
            for step in trace.steps
        ],
        "refreshes_total": trace.slow_steps_total,
        "refreshes": refreshes,
    }


def _kept_texts(trace: Trace, limits: Limits) -> list[list[Any]]:
    """Token texts as [first position, texts] stretches; one stretch where nothing is left out."""
    total = len(trace.tokens)
    if total <= limits.history_tokens:
        return [[0, trace.tokens]] if total else []
    for around in (_EVIDENT_CONTEXT_TOKENS, 0):
        keep = bytearray(total)
        for start, end in _wanted(trace, limits, around):
            keep[start:end] = b"\x01" * (end - start)
        if sum(keep) <= limits.history_tokens:
            break
    # Still too many: the first ones stand, and the end of the history as always.
    room = limits.history_tokens - limits.tail_tokens
    counts = list(accumulate(keep))
    for position in range(total - limits.tail_tokens):
        if counts[position] > room:
            keep[position] = 0
    stretches: list[list[Any]] = []
    for position, wanted in enumerate(keep):
        if not wanted:
            continue
        if not stretches or stretches[-1][0] + len(stretches[-1][1]) < position:
            stretches.append([position, []])
        stretches[-1][1].append(trace.tokens[position])
    return stretches


def _wanted(trace: Trace, limits: Limits, around: int) -> Iterable[tuple[int, int]]:
    total = len(trace.tokens)
    yield 0, min(total, limits.head_tokens)
    yield max(0, total - limits.tail_tokens), total
    runs: Iterable[Run] = (run for refresh in trace.refreshes for run in refresh.union)
    for start, length, _ in runs:
        yield max(0, start - around), min(total, start + length + around)
