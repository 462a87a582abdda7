"""What a fidelity measurement found, as plain frozen data; `as_json()` gives it to reports.

Every field says which way is better. Quantiles are by nearest rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sfi_agent.evaluation.fidelity.spread import Spread

__all__ = [
    "Acceptance",
    "DistanceFidelity",
    "ForcedFidelity",
    "FreeFidelity",
    "LayerFidelity",
    "PolicyFidelity",
    "TextMode",
    "Uncertainty",
    "Verdict",
    "VerdictLevel",
]

TextMode = Literal["text", "continuation"]
"""Which ids are forced: the text itself, or the dense model's own greedy continuation."""

VerdictLevel = Literal["exact", "safe", "caution", "unsafe", "undecided"]


@dataclass(frozen=True, slots=True)
class LayerFidelity:
    """One layer over all probed fast steps.

    Attributes:
        layer: Index.
        recall_mean: Share of the dense attention's mass on what the fast step sees, mean over
            steps and query heads, 0 to 1; higher is better. None for a layer that reads its whole
            history (or band) at every step.
        recall_p1: 1st percentile of the same numbers; higher is better.
        head_recall: Mean per query head; empty where `recall_mean` is None.
        output_error_mean: Relative L2 error of the attention output, mean over steps; lower is
            better.
        output_error_p99: 99th percentile; lower is better.
        steps: Probed steps.
    """

    layer: int
    recall_mean: float | None
    recall_p1: float | None
    head_recall: tuple[float, ...]
    output_error_mean: float | None
    output_error_p99: float | None
    steps: int

    @property
    def lost_mass(self) -> float:
        """`1 - recall_mean`; 0 for a layer that reads everything. Lower is better."""
        return 0.0 if self.recall_mean is None else 1.0 - self.recall_mean


@dataclass(frozen=True, slots=True)
class DistanceFidelity:
    """Tokens that were as many fast steps away from the last refresh.

    Attributes:
        from_tokens: Least distance; 0 is a token drawn from a slow step itself.
        to_tokens: Greatest distance, None for no limit.
        tokens: How many there were.
        kl_mean_nats: Mean KL(dense || policy); lower is better.
        agreement: Share of equal top-1 tokens; higher is better.
    """

    from_tokens: int
    to_tokens: int | None
    tokens: int
    kl_mean_nats: float
    agreement: float

    @property
    def label(self) -> str:
        """Such as "0", "2-3", "64+"."""
        if self.to_tokens is None:
            return f"{self.from_tokens}+"
        if self.to_tokens == self.from_tokens:
            return str(self.from_tokens)
        return f"{self.from_tokens}-{self.to_tokens}"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What dense decoding would keep of the fast steps' own choices, on the same ids.

    Attributes:
        drafted_tokens: Tokens drawn from fast steps.
        agreed_tokens: Those that are dense's own choice, each judged alone.
        kept_tokens: Those before the first disagreement of their segment: what a verifying slow
            step at the end of the segment would keep.
    """

    drafted_tokens: int
    agreed_tokens: int
    kept_tokens: int

    @property
    def agreed_share(self) -> float | None:
        """`agreed_tokens / drafted_tokens`; higher is better. None without drafts."""
        return self.agreed_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def kept_share(self) -> float | None:
        """`kept_tokens / drafted_tokens`; higher is better. None without drafts."""
        return self.kept_tokens / self.drafted_tokens if self.drafted_tokens else None


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """How much of the error lies where the fast step itself is uncertain: what a retry can mend.

    Attributes:
        above_nats: Entropy of the fast step's distribution from which it counts as uncertain.
        token_share: Share of the tokens drawn from fast steps that were; lower is cheaper to
            retry.
        kl_share: Share of their summed KL(dense || policy); higher means that retries mend more.
    """

    above_nats: float
    token_share: float
    kl_share: float


@dataclass(frozen=True, slots=True)
class ForcedFidelity:
    """Next-token distributions on given ids, over all windows.

    Attributes:
        tokens: Compared tokens.
        kl_nats: KL(dense || policy) per token; lower is better.
        agreement: Share of tokens where both have the same top-1 token; higher is better.
        by_distance: The same by distance to the last refresh.
        acceptance: See `Acceptance`. None under verify, where every kept token was drawn from dense
            logits: see `FreeFidelity.verified_acceptance`.
        uncertainty: See `Uncertainty`. None without fast steps and under verify.
        slow_share: Dense passes over the history per token; lower is cheaper.
        memory_share: Tokens that a fast step could see over tokens there were, mean over fast
            steps and sparse layers, 0 to 1; lower is cheaper. None without fast steps.
    """

    tokens: int
    kl_nats: Spread
    agreement: float
    by_distance: tuple[DistanceFidelity, ...]
    acceptance: Acceptance | None
    uncertainty: Uncertainty | None
    slow_share: float
    memory_share: float | None


@dataclass(frozen=True, slots=True)
class FreeFidelity:
    """Greedy output of the policy beside dense greedy output, from the same prompts.

    Attributes:
        agreed_tokens: Per window the length of the common prefix; higher is better.
        dense_tokens: Per window the length of dense output, the most that could agree.
        median_agreed_tokens: Median of `agreed_tokens`.
        identical: Windows whose whole output is equal; higher is better.
        slow_share: Dense passes over the history per generated token; lower is cheaper.
        verified_acceptance: Share of drafted tokens that verification kept, exactly; higher is
            better. None unless the policy's slow steps verify.
    """

    agreed_tokens: tuple[int, ...]
    dense_tokens: tuple[int, ...]
    median_agreed_tokens: float
    identical: int
    slow_share: float
    verified_acceptance: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the policy is safe on this checkpoint and text; thresholds are in `verdict`.

    Attributes:
        level: "exact" is dense output; "safe", "caution" and "unsafe" go by the thresholds;
            "undecided" says that too little was measured.
        sentence: The verdict with the numbers it rests on.
        remedies: What to change, most promising first; empty where nothing need be changed.
    """

    level: VerdictLevel
    sentence: str
    remedies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyFidelity:
    """All that was measured of one policy.

    Attributes:
        policy: How the caller calls it.
        config: The configuration that ran (greedy), resolved.
        forced: By text mode.
        layers: One entry per layer of the model, over the fast steps of both text modes.
        free: Free-running output.
        verdict: What it comes to.
    """

    policy: str
    config: Mapping[str, Any]
    forced: Mapping[TextMode, ForcedFidelity]
    layers: tuple[LayerFidelity, ...]
    free: FreeFidelity
    verdict: Verdict

    @property
    def worst_layer(self) -> LayerFidelity | None:
        """The layer with the least mean recall; None where every layer reads everything."""
        sparse = [layer for layer in self.layers if layer.recall_mean is not None]
        return max(sparse, key=lambda layer: layer.lost_mass) if sparse else None

    def as_json(self) -> dict[str, Any]:
        """All fields and shares as JSON data."""
        data = asdict(self)
        for mode, found in self.forced.items():
            if found.acceptance is not None:
                acceptance = data["forced"][mode]["acceptance"]
                acceptance["agreed_share"] = found.acceptance.agreed_share
                acceptance["kept_share"] = found.acceptance.kept_share
        return data
