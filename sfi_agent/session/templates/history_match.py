"""How far two id sequences agree, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["common_prefix", "describe_difference"]


def common_prefix(ids_a: Sequence[int], ids_b: Sequence[int]) -> int:
    """Number of leading ids that both sequences share."""
    limit = min(len(ids_a), len(ids_b))
    if list(ids_a[:limit]) == list(ids_b[:limit]):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if list(ids_a[low:middle]) == list(ids_b[low:middle]):
            low = middle
        else:
            high = middle
    return low


def describe_difference(
    tokenizer: PreTrainedTokenizerBase, ids_a: Sequence[int], ids_b: Sequence[int]
) -> str:
    """One line for a log: the first differing position and the text around it on both sides."""
    start = common_prefix(ids_a, ids_b)
    if start == len(ids_a) == len(ids_b):
        return f"no difference in {start} tokens"
    around = [
        tokenizer.decode(list(ids[max(0, start - 4) : start + 8]), skip_special_tokens=False)
        for ids in (ids_a, ids_b)
    ]
    return f"token {start}: history has {around[0]!r}, the new rendering has {around[1]!r}"
