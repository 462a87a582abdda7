"""Turns what single steps showed into the records of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sfi_agent.evaluation.fidelity.attention_probe import AttentionSample
from sfi_agent.evaluation.fidelity.distributions import Step
from sfi_agent.evaluation.fidelity.records import (
    Acceptance,
    DistanceFidelity,
    ForcedFidelity,
    FreeFidelity,
    LayerFidelity,
    Uncertainty,
)
from sfi_agent.evaluation.fidelity.spread import Spread, mean, nearest_rank
from sfi_agent.observe.trace import StepRecord

__all__ = [
    "DISTANCES",
    "UNCERTAIN_ABOVE_NATS",
    "ForcedTokens",
    "FreeTokens",
    "summarize_forced",
    "summarize_free",
    "summarize_layers",
]

DISTANCES: tuple[tuple[int, int | None], ...] = (
    (0, 0),
    (1, 1),
    (2, 3),
    (4, 7),
    (8, 15),
    (16, 31),
    (32, 63),
    (64, None),
)
"""Bounds of `DistanceFidelity`, in tokens since the last refresh."""

UNCERTAIN_ABOVE_NATS = 0.3
"""Threshold of the retrying entropy detector in the preset `balanced`."""


@dataclass(slots=True)
class ForcedTokens:
    """The tokens of one text mode, window after window.

    Attributes:
        records: How each token's step was taken.
        steps: The comparison with dense, one per record.
        verified: The policy's slow steps verify, so that what is compared is dense already.
    """

    records: list[StepRecord] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    verified: bool = False


@dataclass(slots=True)
class FreeTokens:
    """Free-running output, one entry per window.

    Attributes:
        agreed: Common prefix with dense output, in tokens.
        dense: Tokens of dense output.
        identical: Whether the outputs are equal.
        records: The steps of the policy's output, of all windows.
    """

    agreed: list[int] = field(default_factory=list)
    dense: list[int] = field(default_factory=list)
    identical: list[bool] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)


def summarize_forced(tokens: ForcedTokens) -> ForcedFidelity:
    """Distributions on given ids; at least one token."""
    records, steps = tokens.records, tokens.steps
    fast = [record for record in records if record.kind == "fast"]
    shares = [record.memory_tokens / record.position for record in fast]
    return ForcedFidelity(
        tokens=len(steps),
        kl_nats=Spread.of([step.kl_nats for step in steps]),
        agreement=_agreement(steps),
        by_distance=tuple(_by_distance(records, steps)),
        acceptance=None if tokens.verified else _acceptance(records, steps),
        uncertainty=None if tokens.verified else _uncertainty(records, steps),
        slow_share=_slow_share(records),
        memory_share=mean(shares) if shares else None,
    )


def summarize_free(tokens: FreeTokens) -> FreeFidelity:
    """Free-running output of at least one window."""
    drafted = sum(record.drafted_tokens for record in tokens.records)
    accepted = sum(record.accepted_tokens for record in tokens.records)
    return FreeFidelity(
        agreed_tokens=tuple(tokens.agreed),
        dense_tokens=tuple(tokens.dense),
        median_agreed_tokens=statistics.median(tokens.agreed),
        identical=sum(tokens.identical),
        slow_share=_slow_share(tokens.records),
        verified_acceptance=accepted / drafted if drafted else None,
    )


def summarize_layers(samples: Iterable[AttentionSample], num_layers: int) -> list[LayerFidelity]:
    """One entry per layer, also for layers of which there are no samples."""
    by_layer: dict[int, list[AttentionSample]] = {layer: [] for layer in range(num_layers)}
    for sample in samples:
        by_layer[sample.layer].append(sample)
    return [_layer(layer, found) for layer, found in by_layer.items()]


def _layer(layer: int, samples: Sequence[AttentionSample]) -> LayerFidelity:
    if not samples:
        return LayerFidelity(layer, None, None, (), None, None, 0)
    heads = list(zip(*(sample.recall for sample in samples), strict=True))
    recall = [value for sample in samples for value in sample.recall]
    errors = [sample.output_error for sample in samples]
    return LayerFidelity(
        layer=layer,
        recall_mean=mean(recall),
        recall_p1=nearest_rank(recall, 0.01),
        head_recall=tuple(mean(head) for head in heads),
        output_error_mean=mean(errors),
        output_error_p99=nearest_rank(errors, 0.99),
        steps=len(samples),
    )


def _by_distance(
    records: Sequence[StepRecord], steps: Sequence[Step]
) -> Iterable[DistanceFidelity]:
    for low, high in DISTANCES:
        found = [
            step
            for record, step in zip(records, steps, strict=True)
            if low <= _distance(record) and (high is None or _distance(record) <= high)
        ]
        if found:
            kl = mean([step.kl_nats for step in found])
            yield DistanceFidelity(low, high, len(found), kl, _agreement(found))


def _distance(record: StepRecord) -> int:
    """Fast steps since the refresh that the token's step saw."""
    return record.segment_tokens if record.kind == "fast" else 0


def _acceptance(records: Sequence[StepRecord], steps: Sequence[Step]) -> Acceptance:
    drafted = agreed = kept = 0
    intact = True
    for record, step in zip(records, steps, strict=True):
        if record.kind != "fast":
            intact = True
            continue
        intact = intact and step.agrees
        drafted += 1
        agreed += step.agrees
        kept += intact
    return Acceptance(drafted, agreed, kept)


def _uncertainty(records: Sequence[StepRecord], steps: Sequence[Step]) -> Uncertainty | None:
    fast = [step for record, step in zip(records, steps, strict=True) if record.kind == "fast"]
    if not fast:
        return None
    above = [step.kl_nats for step in fast if step.entropy_nats > UNCERTAIN_ABOVE_NATS]
    total = math.fsum(step.kl_nats for step in fast)
    share = math.fsum(above) / total if total else 0.0
    return Uncertainty(UNCERTAIN_ABOVE_NATS, len(above) / len(fast), share)


def _slow_share(records: Sequence[StepRecord]) -> float:
    return sum(record.dense_passes for record in records) / len(records)


def _agreement(steps: Sequence[Step]) -> float:
    return sum(step.agrees for step in steps) / len(steps)
