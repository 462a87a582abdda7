"""How much of a prompt several policies can share: prefilled once, densely, then forked."""

from __future__ import annotations

from collections.abc import Iterable

from sfi_agent.config import SessionConfig

__all__ = ["shared_prefill_tokens"]

_OWN_TOKENS = 32
"""Processed by every policy itself at least, so that no step of it is an unusual one."""


def shared_prefill_tokens(prompt_tokens: int, configs: Iterable[SessionConfig]) -> int:
    """How many leading tokens of a prompt can be prefilled for all of these policies.

    Each policy processes the rest itself: twice as many tokens as it takes evidence rows from, so
    its first selection is the one that a session of its own would make.

    Args:
        prompt_tokens: Length of the prompt.
        configs: The policies.
    """
    rows = [2 * c.refresh.prefill_evidence_queries for c in configs if c.mode == "slow_fast"]
    return max(0, prompt_tokens - max(_OWN_TOKENS, *rows, 0))
