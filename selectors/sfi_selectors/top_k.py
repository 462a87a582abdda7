"""One set of tokens per layer, shared by all its KV heads."""

from __future__ import annotations

from sfi_agent import Evidence, Ranking, Selection, Settings
from sfi_selectors._evidence import log_sum_rows, row_log_mass
from sfi_selectors._ranking import choose, ranking_keys

__all__ = ["TopK", "TopKConfig"]


class TopKConfig(Settings):
    """`top_k` has no options."""


class TopK:
    """Top-k of attention mass summed over all heads of the layer; every head gets the same set.

    Score of candidate k: mean over rows and KV heads of p_r(k) * (1 - rest_mass_r). Because each
    row brings the mass that it really spends on the candidates, heads that look at the sink do not
    outvote the ones that retrieve. Higher is better; ties go to the lower position.

    Source: the shared heavy-hitter set of H2O (arXiv 2306.14048), without its eviction: history
    stays complete, and the next slow step may choose anything again.
    """

    needs: frozenset[str] = frozenset()
    ranking = Ranking(shared_by_heads=True)

    def __init__(self, config: TopKConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions, equal for all KV heads.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`; no key norms needed.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1.
        """
        heads = evidence.logits.shape[1]
        scores = log_sum_rows(row_log_mass(evidence).flatten(1, 2)).unsqueeze(1)
        shared = choose(ranking_keys(scores), budget, evidence.candidate_start)
        return Selection(
            positions=shared.positions.expand(-1, heads, -1).contiguous(),
            counts=shared.counts.expand(-1, heads).contiguous(),
        )
