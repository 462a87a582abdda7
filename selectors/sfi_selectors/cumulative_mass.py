"""As many tokens as a head needs: the smallest set that holds a share of its attention."""

from __future__ import annotations

from pydantic import Field

from sfi_agent import Evidence, Selection, Settings
from sfi_selectors._evidence import head_log_mass
from sfi_selectors._ranking import checked_count, choose, padded_selection, ranking_keys

__all__ = ["CumulativeMass", "CumulativeMassConfig"]


class CumulativeMassConfig(Settings):
    """Options of `cumulative_mass`."""

    mass: float = Field(
        default=0.95,
        gt=0.0,
        le=1.0,
        description="Share of the candidates' attention mass that the chosen set must reach; "
        "1.0 chooses every candidate that the budget allows.",
        json_schema_extra={"unit": "fraction"},
    )


class CumulativeMass:
    """Top-p over candidates: per KV head the smallest set with mass p, capped by the budget.

    Candidates are taken in the order of their attention mass (mean over rows of
    p_r(k) * (1 - rest_mass_r), so rows that spend their mass on sink and recent tokens count
    less; ties to the lower position) until the taken ones hold `mass` of what all candidates of
    that head hold. Sharp heads take few places, diffuse heads up to the budget. A head without any
    visible candidate has no mass to measure and fills its budget.

    Source: top-p pruning of Twilight (arXiv 2502.02770).
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: CumulativeMassConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose at most `budget` positions per KV head; `counts` differ between heads.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`; no key norms needed.
            budget: Most places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1.
        """
        import torch

        scores = head_log_mass(evidence)
        keys = ranking_keys(scores)
        if self.config.mass == 1.0:
            # Sums of floats reach 1 before the tail is in: "everything" must not depend on them.
            return choose(keys, budget, evidence.candidate_start)
        candidates = scores.shape[-1]
        ranked = keys.topk(checked_count(budget, candidates), dim=-1, sorted=True).indices
        total = scores.logsumexp(dim=-1, keepdim=True)
        total = torch.where(total > -torch.inf, total, 0.0)
        reached = (scores.gather(-1, ranked) - total).exp().cumsum(dim=-1)
        before = torch.constant_pad_nd(reached[..., :-1], (1, 0), 0.0)
        kept = before < self.config.mass
        # Dropped places get an index above all others, so that sorting moves them to the end.
        indices = torch.where(kept, ranked, torch.full_like(ranked, candidates)).sort(dim=-1).values
        return padded_selection(indices, kept.sum(dim=-1), budget, evidence.candidate_start)
