"""How much history a session is left with when a decoding ends, read from its trace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sfi_agent.observe.trace import StepRecord

__all__ = ["settled_tokens"]


def settled_tokens(trace: Sequence[StepRecord], tokens: int) -> int:
    """Keys and values of a session whose last decoding ended behind its first `tokens` ids.

    All but those of the pending id, unless rectify left a segment open there: what its fast steps
    wrote is then dropped (see docs/decisions.md).

    Args:
        trace: Of a session that may have gone further.
        tokens: Ids that are kept.
    """
    whole = max(0, tokens - 1)
    index = bisect_left(trace, whole, key=lambda record: record.position)
    if index == len(trace) or trace[index].position != whole or _has_dense_keys(trace, index):
        return whole
    while index and trace[index].kind == "fast":
        index -= 1
    return trace[index].position if _slow_step(trace, index) == "rectify" else whole


def _has_dense_keys(trace: Sequence[StepRecord], index: int) -> bool:
    """Whether dense passes had processed all before a token when it was drawn, or verified it."""
    if trace[index].kind != "fast":
        return True
    while index < len(trace) and trace[index].kind == "fast" and not trace[index].drafted_tokens:
        index += 1
    return index < len(trace) and trace[index].drafted_tokens > 0


def _slow_step(trace: Sequence[StepRecord], index: int) -> str | None:
    """The kind of slow step of the policy that took a slow step. Those of stretches that must be
    exact are verifying ones under any policy, and a slow step of the policy's own opens them."""
    while index and trace[index].slow_step in (None, "verify"):
        index -= 1
    return trace[index].slow_step
