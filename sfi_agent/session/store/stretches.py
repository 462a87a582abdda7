"""Which tokens are written anew: those that no file holds, and small files before them.

A stretch once written never changes. A new one takes in those before it that are no larger, as
carrying does in binary counting: of n tokens that are saved in many steps, each is written about
log2(n) times at most, and they lie in about log2(n) stretches.
"""

from __future__ import annotations

from collections.abc import Sequence

from sfi_agent.session.store.manifest import SavedStretch

__all__ = ["plan_stretches", "used_part"]


def used_part(stretches: Sequence[SavedStretch], tokens: int) -> list[SavedStretch]:
    """The first `tokens` tokens of what is written; the last stretch may hold more than is used."""
    found, left = [], tokens
    for stretch in stretches:
        if left <= 0:
            break
        used = min(left, stretch.tokens)
        found.append(
            SavedStretch(tokens=used, held_tokens=stretch.held_tokens, shards=stretch.shards)
        )
        left -= used
    return found


def plan_stretches(written: Sequence[SavedStretch], tokens: int) -> tuple[list[SavedStretch], int]:
    """What stays as it is, and where the new stretch begins.

    Args:
        written: What is still right of what lies in the directory, in order.
        tokens: Tokens that are to be saved, at least as many as those.

    Returns:
        The stretches that stay, and the first token of a new one that reaches to the end; it is
        `tokens` where nothing is to be written.
    """
    kept = list(written)
    start = sum(stretch.tokens for stretch in kept)
    while kept and start < tokens and _is_taken_in(kept[-1], tokens - start):
        start -= kept.pop().tokens
    return kept, start


def _is_taken_in(stretch: SavedStretch, new_tokens: int) -> bool:
    # Of a stretch of which a rewind left less than half, the rest would lie there for nothing.
    return stretch.tokens <= new_tokens or 2 * stretch.tokens < stretch.held_tokens
