"""What a step's attention is told besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["AttentionOptions", "EvidenceBuffers"]


@dataclass(frozen=True, slots=True)
class EvidenceBuffers:
    """Where a slow step writes what a selector will look at.

    Attributes:
        logits: `[batch, kv_heads, rows, capacity]`, one row per asked query and head of the group,
            query-major; column p is absolute position p. Only candidates are written, and none
            behind the capacity. float32 is
            what selectors are promised; float16 halves the scratch (the step is not faster) and
            keeps logits of up to 16 nats to 0.004, which serves `selection.rank`.
        rest_mass: `[batch, kv_heads, rows]` float32, each row's attention mass outside the
            candidates.
        sink_tokens: Positions below are not candidates.
        recent_tokens: The newest tokens, the step's own included, are not candidates.
        queries: How many of the newest queries are asked; rows = queries x group.
    """

    logits: Tensor
    rest_mass: Tensor
    sink_tokens: int
    recent_tokens: int
    queries: int = 1


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What is the same for every step of a layer and kind.

    Attributes:
        scale: Factor of the logits.
        softcap: Logits become `softcap * tanh(logits / softcap)`; 0 leaves them.
        window: Each query sees itself and the `window - 1` positions before; 0 sees all.
        append: Whether the new keys and values are written behind the earlier tokens.
        own_tokens: Whether the step's own tokens are attended (and appended). Without them every
            query sees all of `[start, end)`, which is how queries of several sequences read a
            prefix they share; merge by log-sum-exp.
        with_values: Whether outputs are wanted; without, only evidence and log-sum-exps are
            computed, which reads half as many bytes.
    """

    scale: float
    softcap: float = 0.0
    window: int = 0
    append: bool = True
    own_tokens: bool = True
    with_values: bool = True
