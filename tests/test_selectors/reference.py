"""The selectors once more in plain Python: float64, one loop per sum, no sharing with the package.

Each function handles one sequence; lists are nested as the tensors are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sfi_agent import Evidence
from sfi_selectors import KlFusionConfig

Row = list[float]
NEVER = -math.inf


def log_sum(values: Row) -> float:
    peak = max(values)
    if peak == NEVER:
        return NEVER
    return peak + math.log(math.fsum(math.exp(value - peak) for value in values))


def normalised(values: Row) -> Row:
    total = log_sum(values)
    return [value - total for value in values]


def head_mass(evidence: Evidence, sequence: int = 0) -> list[Row]:
    """Mean attention mass per KV head and candidate, rows without a finite entry left out."""
    masses = []
    for logits, rest in zip(
        evidence.logits[sequence].tolist(), evidence.rest_mass[sequence].tolist(), strict=True
    ):
        visible = [
            (normalised(row), 1.0 - mass)
            for row, mass in zip(logits, rest, strict=True)
            if max(row) > NEVER
        ]
        count = len(logits[0])
        masses.append(
            [
                math.fsum(share * math.exp(row[k]) for row, share in visible) / max(len(visible), 1)
                for k in range(count)
            ]
        )
    return masses


def best(scores: Row, budget: int) -> list[int]:
    """Indices of the highest scores, ties to the lower index, ascending."""
    ranked = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    return sorted(ranked[:budget])


def best_around_peaks(peaks: list[int], scores: Row, budget: int) -> list[int]:
    """As `best`, for candidates that each belong to a peak: peak by peak, from its middle out."""

    def order(k: int) -> tuple[float, int, int, int]:
        distance = k - peaks[k]
        return -scores[peaks[k]], peaks[k], abs(distance), -distance

    return sorted(sorted(range(len(scores)), key=order)[:budget])


def span(scores: Row, budget: int, radius: int) -> list[int]:
    peaks = []
    for k in range(len(scores)):
        window = range(max(0, k - radius), min(len(scores), k + radius + 1))
        peaks.append(min(window, key=lambda j: (-scores[j], j)))
    return best_around_peaks(peaks, scores, budget)


def page(scores: Row, budget: int, page_tokens: int, start: int) -> list[int]:
    peaks = []
    for k in range(len(scores)):
        number = (start + k) // page_tokens
        members = [j for j in range(len(scores)) if (start + j) // page_tokens == number]
        peaks.append(min(members, key=lambda j: (-scores[j], j)))
    return best_around_peaks(peaks, scores, budget)


def smallest_set(scores: Row, budget: int, mass: float) -> list[int]:
    ranked = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    total = math.fsum(scores)
    taken: list[int] = []
    for k in ranked[:budget]:
        # Without any mass no set falls short of it, and the budget decides.
        if total > 0 and math.fsum(scores[j] for j in taken) >= mass * total:
            break
        taken.append(k)
    return sorted(taken)


@dataclass(frozen=True)
class Scores:
    f: list[Row]
    prior: list[Row]
    weight: Row
    suppressed: list[Row]
    final: list[Row]
    spread: Row
    """Sum of (f - r)^2 per head: where it is tiny, any weight is as good as any other."""


def kl_fusion(evidence: Evidence, config: KlFusionConfig, sequence: int = 0) -> Scores:
    assert evidence.key_norms is not None
    logits = evidence.logits[sequence].tolist()
    norms = evidence.key_norms[sequence].tolist()
    f, prior, weight, suppressed, spread = [], [], [], [], []
    for head_logits, head_norms in zip(logits, norms, strict=True):
        visible = [normalised(row) for row in head_logits if max(row) > NEVER]
        log_f = aggregate(visible, len(head_norms), config.alpha)
        log_r = log_prior(head_norms, config)
        f.append([math.exp(value) for value in log_f])
        prior.append([math.exp(value) for value in log_r])
        weight.append(fusion_weight(f[-1], prior[-1], len(visible), config))
        spread.append(math.fsum((a - b) ** 2 for a, b in zip(f[-1], prior[-1], strict=True)))
        fused = []
        for a, b in zip(log_f, log_r, strict=True):
            keep = math.log1p(-weight[-1]) + a if weight[-1] < 1 else NEVER
            add = math.log(weight[-1]) + b if weight[-1] > 0 else NEVER
            fused.append(log_sum([keep, add]))
        suppressed.append(suppress(normalised(fused), config))
    return Scores(f, prior, weight, suppressed, mutex(suppressed, config), spread)


def aggregate(rows: list[Row], count: int, alpha: float) -> Row:
    if not rows:
        return normalised([0.0] * count)
    values = []
    for k in range(count):
        column = [row[k] for row in rows]
        if max(column) == NEVER:
            values.append(NEVER)
        elif alpha < 1e-6:
            values.append(math.fsum(value for value in column if value > NEVER) / len(rows))
        else:
            raised = log_sum([alpha * value for value in column])
            values.append((raised - math.log(len(rows))) / alpha)
    return normalised(values)


def log_prior(norms: Row, config: KlFusionConfig) -> Row:
    beta = -math.log(config.position_theta) / config.position_p
    values = []
    for k, norm in enumerate(norms):
        x = k / max(len(norms) - 1, 1)
        position = -beta * x**config.position_power
        if config.position_eta > 0:
            position += config.position_eta * math.log(max(1.0 - x, 1e-12))
        size = -config.gamma * math.log(max(norm, 1e-12))
        values.append(config.norm_weight * size + config.position_weight * position)
    return normalised(values)


def fusion_weight(f: Row, prior: Row, rows: int, config: KlFusionConfig) -> float:
    ff = math.fsum(value * value for value in f)
    rr = math.fsum(value * value for value in prior)
    fr = math.fsum(a * b for a, b in zip(f, prior, strict=True))
    limit = config.fusion_limit_multi if rows > 1 else config.fusion_limit_single
    return min(max((ff - fr) / max(ff - 2 * fr + rr, 1e-12), 0.0), limit)


def suppress(scores: Row, config: KlFusionConfig) -> Row:
    half = config.nms_window // 2
    if config.nms_window <= 1 or config.soft_alpha <= 0:
        return scores
    values = []
    for k, score in enumerate(scores):
        pool = max(scores[max(0, k - half) : k + half + 1])
        values.append(score - config.soft_alpha * (pool - score) if score > NEVER else NEVER)
    return values


def mutex(scores: list[Row], config: KlFusionConfig) -> list[Row]:
    if len(scores) <= 2 or config.cross_head_alpha <= 0:
        return scores
    values = [list(row) for row in scores]
    for k in range(len(scores[0])):
        tempered = [row[k] / config.cross_head_temperature for row in scores]
        if max(tempered) == NEVER:
            continue
        for head, log_share in enumerate(normalised(tempered)):
            values[head][k] += config.cross_head_alpha * max(log_share, math.log(1e-12))
    return values
