"""What plugins receive and return: events, boundaries, evidence, selections, and two protocols.

Importing this module does not import torch; tensors appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DETECTOR_NEEDS",
    "SELECTOR_NEEDS",
    "Boundary",
    "BoundaryDetector",
    "Evidence",
    "Ranking",
    "Selection",
    "Selector",
    "StepEvent",
    "TokenEvent",
    "declared_ranking",
]

DETECTOR_NEEDS = frozenset({"text", "entropy", "attention_drift"})
"""What a detector may ask for. What no detector of a session needs is not computed."""

SELECTOR_NEEDS = frozenset({"key_norms"})
"""What a selector may ask for beyond the attention logits."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """A detector's report that the history should be looked at again.

    Attributes:
        reason: Short text for the trace, such as "punctuation: sentence start".
        when: "next" makes the next step slow. "now", from `after_step` only, discards the fast
            step that was just seen and runs the same token densely (a retry).
    """

    reason: str
    when: Literal["now", "next"] = "next"


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A fast step whose logits exist and from which nothing has been sampled yet.

    Attributes:
        position: Absolute position of the token that the step processed.
        entropy_nats: Entropy of the next-token distribution (temperature 1, no filter), in nats;
            None unless a detector needs "entropy".
        selected_mass: Share of the step's attention mass on the selected tokens, averaged over
            sparse layers and query heads, 0 to 1; None unless a detector needs "attention_drift",
            and in a model without sparse layers.
    """

    position: int
    entropy_nats: float | None = None
    selected_mass: float | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token that was chosen and now belongs to the sequence.

    Attributes:
        token_id: The chosen id.
        position: Its absolute position in the sequence.
        text: The text this token adds to the running text. Empty while a character is incomplete
            (byte-level tokens) and when no detector needs "text".
        entropy_nats: Entropy of the distribution it came from, in nats; None unless needed.
    """

    token_id: int
    position: int
    text: str = ""
    entropy_nats: float | None = None


@runtime_checkable
class BoundaryDetector(Protocol):
    """Watches one sequence while it is decoded and reports semantic boundaries.

    A detector is built once per session by its factory and reset at the start of every decoding.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Subset of `DETECTOR_NEEDS` that the events must carry."""
        ...

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Forget everything; decoding starts after these ids.

        Args:
            prompt_ids: The ids that are processed before the first token is chosen in this
                decoding (pending token and new ids, not the whole history).
            prompt_text: Their text; empty unless "text" is needed.
        """
        ...

    def after_step(self, event: StepEvent) -> Boundary | None:
        """Called after every fast step, before a token is chosen. None means no boundary."""
        ...

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """Called after every chosen token, of fast and slow steps alike. None means no boundary."""
        ...

    def snapshot(self) -> Any:
        """The detector's whole state as a value that later calls do not change."""
        ...

    def restore(self, state: Any) -> None:
        """Return to a state that `snapshot` gave; the same state may be restored many times."""
        ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a dense step shows a selector about one layer.

    The candidates are the positions `candidate_start ... candidate_start + candidates - 1`: all
    of the history except sink and recent tokens. There is always at least one candidate.

    Attributes:
        logits: `[batch, kv_heads, rows, candidates]` float32. Scaled post-RoPE attention logits;
            rows are queries x query heads of the KV head's group, query-major (row
            `query * group + head`). Entries a row may not see are -inf. The room is used again
            for the next evidence: a selector that keeps logits keeps a copy.
        key_norms: `[batch, kv_heads, candidates]` float32, L2 norms of the cached (post-RoPE)
            keys; None unless the selector needs "key_norms".
        rest_mass: `[batch, kv_heads, rows]` float32, each row's attention mass on sink and recent
            tokens, 0 to 1; the candidates hold the rest.
        candidate_start: Absolute position of the first candidate.
        prompt_end: Absolute position behind the last token of the prompt that is being answered;
            None where nobody says so, as in tests. The end of the prompt is among the candidates
            once an answer is longer than the recent part.
    """

    logits: Tensor
    key_norms: Tensor | None
    rest_mass: Tensor
    candidate_start: int
    prompt_end: int | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The positions a layer's fast steps may attend to, besides sink and recent tokens.

    Attributes:
        positions: `[batch, kv_heads, budget]` int64, absolute history positions. The first
            `counts` of each head are ascending and distinct, the rest are -1.
        counts: `[batch, kv_heads]` int64, how many positions of each head are valid.
    """

    positions: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Ranking:
    """A selector's promise that its choice is a ranking by attention mass, and nothing else.

    The promise: chosen are the min(budget, candidates) candidates with the most attention mass,
    summed over rows, of each KV head; a row's mass on a candidate is its softmax over the
    candidates times 1 - rest_mass. Ties go to the lower position. Candidates among the last
    min(prompt_tail_tokens, budget // 2) positions before `prompt_end` come before all others.

    Attributes:
        shared_by_heads: Whether mass is summed over all KV heads of the layer too, and every head
            gets the same set.
        prompt_tail_tokens: See above; 0 keeps nothing of the prompt, and so does evidence without
            a prompt end.
    """

    shared_by_heads: bool = False
    prompt_tail_tokens: int = 0


@runtime_checkable
class Selector(Protocol):
    """Chooses, per layer and KV head, what the next fast steps may attend to.

    A selector may have an attribute `ranking`, a `Ranking`, that says in data what it chooses. The
    engine may then choose by fused kernels and not call `select`; where masses differ by no more
    than rounding, it may choose another of them. A subclass with a `select` of its own inherits
    no promise.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Subset of `SELECTOR_NEEDS` that the evidence must carry."""
        ...

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose at most `budget` candidates per KV head of one layer.

        Must not loop over heads in Python nor synchronise with the host, works on any device,
        changes nothing in `evidence`, and is deterministic: ties go to the lower position. Every
        row of the batch is chosen for as if it were alone: captured steps pass several layers as
        a batch.

        Args:
            evidence: See `Evidence`.
            budget: Places per KV head, at least 1 and at most the number of candidates.
        """
        ...


def declared_ranking(selector: Selector) -> Ranking | None:
    """The `ranking` of a selector; None where it has none or `select` was overridden since."""
    ranking: Ranking | None = getattr(selector, "ranking", None)
    if ranking is None or "select" in getattr(selector, "__dict__", {}):
        return None
    for kind in type(selector).__mro__:
        if "ranking" in vars(kind):
            return ranking
        if "select" in vars(kind):
            break
    # An attribute of the instance: of whichever class made it.
    return ranking if "ranking" in getattr(selector, "__dict__", {}) else None
