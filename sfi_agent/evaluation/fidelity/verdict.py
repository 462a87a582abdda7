"""Whether a policy is safe on a checkpoint and text, and what to change if not.

The verdict rests on the dense model's own continuation, the text that a session would write. Text
from elsewhere is harder (the model is less sure of it) and is reported beside it.

    safe       agreement >= 0.99 and KL p99 <= 0.1 nat
    caution    agreement >= 0.95 and KL mean <= 0.05 nat
    unsafe     else
    exact      mode dense, or verify with output identical to dense in every window
    undecided  fewer than 100 tokens, no fast step, or a memory that left hardly anything out
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfi_agent.evaluation.fidelity.records import (
    DistanceFidelity,
    ForcedFidelity,
    FreeFidelity,
    LayerFidelity,
    Verdict,
    VerdictLevel,
)

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig

__all__ = [
    "CAUTION_AGREEMENT",
    "CAUTION_KL_MEAN_NATS",
    "MINIMUM_TOKENS",
    "SAFE_AGREEMENT",
    "SAFE_KL_P99_NATS",
    "WHOLE_HISTORY_SHARE",
    "judge",
]

SAFE_AGREEMENT = 0.99
SAFE_KL_P99_NATS = 0.1
CAUTION_AGREEMENT = 0.95
CAUTION_KL_MEAN_NATS = 0.05
MINIMUM_TOKENS = 100
"""With fewer tokens one disagreement is more than the whole margin, and p99 is the maximum."""
WHOLE_HISTORY_SHARE = 0.9
"""A memory with more than this share of the history leaves too little out to show anything."""

_CONCENTRATED_SHARE = 0.5
_FEW_LAYERS_SHARE = 0.25
_MENDED_BY_RETRY_SHARE = 0.5
_NOTICEABLE_LOSS = 0.02
_DRIFT_FACTOR = 3.0
_DRIFT_TOKENS = 8


def judge(
    config: SessionConfig,
    forced: ForcedFidelity,
    free: FreeFidelity,
    layers: Sequence[LayerFidelity],
) -> Verdict:
    """The verdict on one policy.

    Args:
        config: The policy.
        forced: On the dense model's own continuation.
        free: Free-running output of the same windows.
        layers: All layers of the model.
    """
    exact = _exact(config, free)
    if exact is not None:
        return exact
    undecided = _undecided(forced)
    if undecided is not None:
        return undecided
    # Rounded down, so that nothing is called 100 % that is not.
    agreement = math.floor(forced.agreement * 1000) / 10
    found = (
        f"{agreement:g} % of {forced.tokens} tokens are dense's own choice, KL to dense is "
        f"{_nats(forced.kl_nats.mean)} nat on average and {_nats(forced.kl_nats.p99)} at p99, "
        f"free output is dense's in {free.identical} of {len(free.agreed_tokens)} windows"
    )
    wanted = f"safe is at least {SAFE_AGREEMENT * 100:g} % and at most {SAFE_KL_P99_NATS} at p99"
    if forced.agreement >= SAFE_AGREEMENT and forced.kl_nats.p99 <= SAFE_KL_P99_NATS:
        return Verdict("safe", f"Safe on this text: {found} ({wanted}).", ())
    careful = forced.agreement >= CAUTION_AGREEMENT and forced.kl_nats.mean <= CAUTION_KL_MEAN_NATS
    level: VerdictLevel = "caution" if careful else "unsafe"
    said = "Use with care on this text" if careful else "Not safe on this text"
    sentence = f"{said}: {found} ({wanted})."
    return Verdict(level, sentence, tuple(_remedies(config, forced, layers)))


def _nats(number: float) -> str:
    return "below 0.001" if number < 0.001 else f"{number:.2g}"


def _exact(config: SessionConfig, free: FreeFidelity) -> Verdict | None:
    if config.mode == "dense":
        return Verdict("exact", "Dense decoding itself: there are no fast steps.", ())
    windows = len(free.agreed_tokens)
    if config.slow_step == "verify" and free.identical == windows:
        return Verdict(
            "exact",
            f"Exact: verified, and identical to dense in {windows} of {windows} windows.",
            (),
        )
    return None


def _undecided(forced: ForcedFidelity) -> Verdict | None:
    if forced.memory_share is None:
        return Verdict(
            "undecided",
            f"Undecided: none of the {forced.tokens} tokens came from a fast step.",
            ("open fewer slow steps (refresh.min_segment_tokens), or measure more tokens",),
        )
    share = forced.memory_share
    if share > WHOLE_HISTORY_SHARE:
        return Verdict(
            "undecided",
            f"Undecided: fast steps could see {share * 100:.0f} % of the history, so hardly "
            "anything was left out.",
            ("measure longer prompts, or a smaller memory.selected_tokens",),
        )
    if forced.tokens < MINIMUM_TOKENS:
        return Verdict(
            "undecided",
            f"Undecided: {forced.tokens} tokens are too few, at least {MINIMUM_TOKENS} are needed.",
            ("measure more samples or longer continuations",),
        )
    return None


def _remedies(
    config: SessionConfig, forced: ForcedFidelity, layers: Sequence[LayerFidelity]
) -> list[str]:
    """What to try, most promising first."""
    if config.slow_step == "verify":
        return [
            "verified output differs from dense: in half precision near-ties may flip; "
            "compare in float32"
        ]
    found = []
    doubt = forced.uncertainty
    if doubt is not None and doubt.kl_share >= _MENDED_BY_RETRY_SHARE:
        found.append(
            f"retry uncertain steps: {{name: entropy, threshold_nats: {doubt.above_nats}, when: "
            f"now}} among the boundaries; {doubt.token_share * 100:.1f} % of the fast tokens are "
            f"above it and hold {math.floor(doubt.kl_share * 100)} % of the KL"
        )
    few = _layers_that_lose_most(layers)
    lost = sum(layer.lost_mass for layer in layers)
    if few:
        wanted = sorted({*config.memory.dense_layers, *few})
        found.append(f"keep these layers dense: memory.dense_layers {wanted}")
    elif lost > _NOTICEABLE_LOSS * len(layers):
        tokens = config.memory.selected_tokens
        found.append(f"raise memory.selected_tokens (now {tokens:,}): most layers miss some mass")
    if _drifts(forced):
        limit = config.refresh.max_segment_tokens
        found.append(
            f"refresh more often: refresh.max_segment_tokens below {limit}; the error grows with "
            "the distance to the refresh"
        )
    if config.slow_step == "observe":
        found.append("slow_step rectify, which computes the segment's keys and values again")
    found.append("slow_step verify (preset exact), whose output is that of dense decoding")
    return found


def _layers_that_lose_most(layers: Sequence[LayerFidelity]) -> list[int]:
    """At most a quarter of the layers, if they lose at least half of all that is lost."""
    lost = sum(layer.lost_mass for layer in layers)
    most = max(1, int(len(layers) * _FEW_LAYERS_SHARE))
    ranked = sorted(layers, key=lambda layer: (-layer.lost_mass, layer.layer))
    chosen: list[int] = []
    gathered = 0.0
    for layer in ranked[:most]:
        if gathered >= _CONCENTRATED_SHARE * lost or layer.lost_mass < _NOTICEABLE_LOSS:
            break
        chosen.append(layer.layer)
        gathered += layer.lost_mass
    return chosen if chosen and gathered >= _CONCENTRATED_SHARE * lost else []


def _drifts(forced: ForcedFidelity) -> bool:
    """The KL far from a refresh is several times that near to it."""
    near = [item for item in forced.by_distance if 0 < item.from_tokens < _DRIFT_TOKENS]
    far = [item for item in forced.by_distance if item.from_tokens >= _DRIFT_TOKENS]
    return bool(near and far) and _average_kl(far) > _DRIFT_FACTOR * _average_kl(near)


def _average_kl(items: Sequence[DistanceFidelity]) -> float:
    tokens = sum(item.tokens for item in items)
    return sum(item.kl_mean_nats * item.tokens for item in items) / tokens
