"""Office logs as long as they are wanted: text for prompts and answers of measured sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from sfi_agent.embedded import make_conversation

__all__ = ["office_lines", "office_text"]

_LOG_TOKENS = 4096


def office_lines(seed: int) -> Iterator[str]:
    """Lines of one office log after the other, without end."""
    for number in count(seed):
        yield from make_conversation(number, log_tokens=_LOG_TOKENS, turns=1).log.splitlines()


def office_text(token_limit: int, seed: int, count_tokens: Callable[[str], int]) -> str:
    """Whole lines of office logs, as many as fit.

    Args:
        token_limit: Most tokens of the text.
        seed: Of the logs.
        count_tokens: Tokens of a piece of text, which begins and ends with whole lines.
    """
    kept: list[str] = []
    present = 0
    for line in office_lines(seed):
        tokens = count_tokens(f"{line}\n")
        if present + tokens > token_limit:
            break
        kept.append(line)
        present += tokens
    return "\n".join(kept)
