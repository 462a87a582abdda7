"""The published selector of Slow-Fast Inference: alpha-fair evidence, prior, soft-NMS, mutex."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from sfi_agent import Evidence, InputError, Selection, Settings
from sfi_selectors._evidence import finite_peak, fold_rows, log_sum_rows, row_log_normaliser
from sfi_selectors._ranking import choose, ranking_keys, sliding_maximum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KlFusion", "KlFusionConfig", "KlFusionScores"]

_EPSILON = 1e-12
_GEOMETRIC_BELOW = 1e-6  # |alpha| under which the power mean is taken as its limit
_MUTEX_MINIMUM_HEADS = 3


class KlFusionConfig(Settings):
    """Options of `kl_fusion`; the defaults are the published constants."""

    alpha: float = Field(
        default=0.5,
        ge=0.0,
        le=64.0,
        description="Order of the power mean over rows: 1 is the arithmetic, 0 the geometric mean.",
        json_schema_extra={"unit": "number"},
    )
    gamma: float = Field(
        default=0.5,
        ge=-16.0,
        le=16.0,
        description="Exponent of the key norm in the prior; positive values favour small norms.",
        json_schema_extra={"unit": "number"},
    )
    norm_weight: float = Field(
        default=1.0,
        ge=0.0,
        le=16.0,
        description="Weight of the key-norm part of the prior; 0 switches it off.",
        json_schema_extra={"unit": "number"},
    )
    position_weight: float = Field(
        default=0.7,
        ge=0.0,
        le=16.0,
        description="Weight of the position part of the prior; 0 switches it off.",
        json_schema_extra={"unit": "number"},
    )
    position_power: float = Field(
        default=1.8,
        ge=1.0,
        le=64.0,
        description="Exponent of the relative position in the prior's decay.",
        json_schema_extra={"unit": "number"},
    )
    position_eta: float = Field(
        default=0.4,
        ge=0.0,
        le=64.0,
        description="Exponent of the distance to the last candidate; 0 removes that term.",
        json_schema_extra={"unit": "number"},
    )
    position_theta: float = Field(
        default=0.6,
        gt=0.0,
        le=1.0,
        description="Level which the prior's decay, taken as linear, reaches at position_p.",
        json_schema_extra={"unit": "number"},
    )
    position_p: float = Field(
        default=0.9,
        ge=0.001,
        description="Relative position at which position_theta is reached, 0 oldest and 1 newest.",
        json_schema_extra={"unit": "number"},
    )
    fusion_limit_single: float = Field(
        default=0.35,
        ge=0.0,
        le=1.0,
        description="Largest weight of the prior when a KV head has one evidence row.",
        json_schema_extra={"unit": "number"},
    )
    fusion_limit_multi: float = Field(
        default=0.25,
        ge=0.0,
        le=1.0,
        description="Largest weight of the prior when a KV head has several evidence rows.",
        json_schema_extra={"unit": "number"},
    )
    nms_window: int = Field(
        default=32,
        ge=0,
        description="Neighbours of soft non-maximum suppression, half to either side; 0 and 1 "
        "switch it off.",
        json_schema_extra={"unit": "tokens"},
    )
    soft_alpha: float = Field(
        default=1.0,
        ge=0.0,
        le=64.0,
        description="Share of the log distance to the neighbourhood's maximum that is subtracted "
        "once more; 0 switches suppression off.",
        json_schema_extra={"unit": "number"},
    )
    cross_head_alpha: float = Field(
        default=0.85,
        ge=0.0,
        le=64.0,
        description="Strength with which KV heads are driven to different tokens; 0 switches it "
        "off, as do fewer than three KV heads.",
        json_schema_extra={"unit": "number"},
    )
    cross_head_temperature: float = Field(
        default=2.0,
        ge=0.001,
        description="Temperature of the softmax over KV heads in the cross-head step.",
        json_schema_extra={"unit": "number"},
    )


@dataclass(frozen=True, slots=True)
class KlFusionScores:
    """The intermediate rows of `kl_fusion`, all float32, in the order they arise.

    Attributes:
        f: `[batch, kv_heads, candidates]` power mean of the rows' softmax, a probability.
        prior: `[batch, kv_heads, candidates]` prior r, a probability.
        weight: `[batch, kv_heads]` fusion weight lambda of the prior after the clip, 0 to 1.
        suppressed: `[batch, kv_heads, candidates]` log score s' after soft-NMS.
        final: `[batch, kv_heads, candidates]` log score s'' after the cross-head step; the
            highest are chosen. -inf where no row may see a candidate that the prior does not add.
    """

    f: Tensor
    prior: Tensor
    weight: Tensor
    suppressed: Tensor
    final: Tensor


class KlFusion:
    """The published selector, per KV head, with one coupling between the heads of a layer.

    1. Row r's softmax over the candidates alone, p_r. Mass on sink and recent tokens is discarded
       here, as published; `per_head` and the others keep it.
    2. f(k) = ((1/N) sum_r p_r(k)^alpha)^(1/alpha) over the N rows that see anything (alpha 0: the
       geometric mean), normalised. With alpha 0 a row that may not see k counts as probability 1
       at k, as published; k seen by no row has f(k) = 0.
    3. Prior r(k) ~ norm(k)^(-gamma * norm_weight) * (exp(-beta x^power) (1-x)^eta)^position_weight,
       x the relative position from 0 (oldest) to 1, beta = -ln(position_theta) / position_p.
    4. s = log((1-lambda) f + lambda r), normalised; lambda = sum f (f-r) / sum (f-r)^2, floored at
       0 and cut at `fusion_limit_multi` (N > 1) or `fusion_limit_single`.
    5. Soft-NMS: s'(k) = s(k) - soft_alpha * (max of s within nms_window // 2 of k - s(k)).
    6. Cross-head step over three or more KV heads: s'' = s' + cross_head_alpha * log(softmax over
       heads of s' / cross_head_temperature), the softmax floored at 1e-12.
    7. The min(budget, candidates) highest s''. Higher is better; ties go to the lower position.

    The published code rounds the count up to a kernel tile; here it is exactly the budget.

    Source: Slow-Fast Inference (arXiv 2603.12038), the constants of its public code.
    """

    needs: frozenset[str] = frozenset({"key_norms"})

    def __init__(self, config: KlFusionConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]` and key norms
                `[batch, kv_heads, candidates]`; `rest_mass` is not used.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1, or the evidence has no key norms.
        """
        final = self.scores(evidence).final
        return choose(ranking_keys(final), budget, evidence.candidate_start)

    def scores(self, evidence: Evidence) -> KlFusionScores:
        """The intermediate rows for this evidence, for analysis and tests.

        Raises:
            InputError: The evidence has no key norms.
        """
        if evidence.key_norms is None:
            raise InputError(
                "Scoring candidates with kl_fusion; got evidence without key_norms; allowed: "
                "key_norms of shape [batch, kv_heads, candidates]. Hand over what the selector's "
                "`needs` asks for."
            )
        log_f, rows = self._aggregate(evidence.logits.float())
        log_prior = self._log_prior(evidence.key_norms.float())
        f, prior = log_f.exp(), log_prior.exp()
        weight = self._weight(f, prior, rows)
        suppressed = self._suppress(_fuse(log_f, log_prior, weight))
        return KlFusionScores(f, prior, weight, suppressed, self._separate_heads(suppressed))

    def _aggregate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Steps 1 and 2: log f `[batch, kv_heads, candidates]` and N `[batch, kv_heads]`."""
        import torch

        normaliser = row_log_normaliser(logits)
        sees = normaliser < torch.inf
        rows = sees.sum(dim=(-2, -1))
        row_count = rows.clamp(min=1).unsqueeze(-1)
        log_p = logits - normaliser
        if self.config.alpha < _GEOMETRIC_BELOW:
            visible = log_p > -torch.inf
            log_f = fold_rows(torch.where(visible, log_p, 0.0)) / row_count
            log_f = torch.where(visible.any(dim=-2), log_f, -torch.inf)
        else:
            # Mean of exp(a (lp - peak)) - 1 instead of exp(a lp): keeps its digits for small alpha.
            peak = finite_peak(log_p)
            raised = ((log_p - peak) * self.config.alpha).expm1_()
            mean = fold_rows(torch.where(sees, raised, 0.0)) / row_count
            log_f = mean.log1p() / self.config.alpha + peak.squeeze(-2)
        # A head that sees nothing has no opinion: the uniform distribution.
        return _normalised(torch.where((rows > 0).unsqueeze(-1), log_f, 0.0)), rows

    def _log_prior(self, norms: Tensor) -> Tensor:
        """Step 3: log r, `[batch, kv_heads, candidates]`, from key norms of that shape."""
        import torch

        config = self.config
        last = max(norms.shape[-1] - 1, 1)
        index = torch.arange(norms.shape[-1], device=norms.device, dtype=torch.float32)
        decay = -math.log(config.position_theta) / config.position_p
        remaining = ((last - index) / last).clamp(min=_EPSILON)
        position = -decay * (index / last) ** config.position_power
        position = position + config.position_eta * remaining.log()
        size = -config.gamma * norms.clamp(min=_EPSILON).log()
        return _normalised(config.norm_weight * size + config.position_weight * position)

    def _weight(self, f: Tensor, prior: Tensor, rows: Tensor) -> Tensor:
        """Step 4, the weight lambda `[batch, kv_heads]`: minimises |(1-l) f + l r|^2, clipped.

        Written with f - r, which loses fewer digits than the published sums where f is close to r.
        """
        import torch

        difference = f - prior
        best = (f * difference).sum(-1) / difference.square().sum(-1).clamp(min=_EPSILON)
        limit = torch.where(
            rows > 1, self.config.fusion_limit_multi, self.config.fusion_limit_single
        )
        return best.clamp(min=0.0).minimum(limit.to(best.dtype))

    def _suppress(self, scores: Tensor) -> Tensor:
        """Step 5: log scores s' from s, `[batch, kv_heads, candidates]`."""
        import torch

        half = self.config.nms_window // 2
        if half < 1 or self.config.soft_alpha == 0:
            return scores
        visible = scores > -torch.inf
        excess = torch.where(visible, sliding_maximum(scores, half) - scores, 0.0)
        return scores - self.config.soft_alpha * excess

    def _separate_heads(self, scores: Tensor) -> Tensor:
        """Step 6: log scores s'' from s', `[batch, kv_heads, candidates]`."""
        import torch

        config = self.config
        if scores.shape[1] < _MUTEX_MINIMUM_HEADS or config.cross_head_alpha == 0:
            return scores
        tempered = scores / config.cross_head_temperature
        shared = log_sum_rows(tempered).unsqueeze(1)
        shared = torch.where(shared > -torch.inf, shared, torch.inf)
        share = (tempered - shared).clamp(min=math.log(_EPSILON))
        return scores + config.cross_head_alpha * share


def _normalised(log_values: Tensor) -> Tensor:
    """Shift logs so that their exponentials sum to 1 over the last axis."""
    return log_values - log_values.logsumexp(dim=-1, keepdim=True)


def _fuse(log_f: Tensor, log_prior: Tensor, weight: Tensor) -> Tensor:
    """Step 4: log((1-weight) f + weight r), normalised; `[batch, kv_heads, candidates]`."""
    import torch

    weight = weight.unsqueeze(-1)
    parts = torch.stack((log_f + (-weight).log1p(), log_prior + weight.log()), dim=-2)
    return _normalised(log_sum_rows(parts))
