"""The plain choice: each KV head keeps the candidates that its query heads attend to most."""

from __future__ import annotations

from sfi_agent import Evidence, Ranking, Selection, Settings
from sfi_selectors._evidence import head_log_mass_pieces
from sfi_selectors._ranking import choose_from_pieces

__all__ = ["PerHead", "PerHeadConfig"]


class PerHeadConfig(Settings):
    """`per_head` has no options."""


class PerHead:
    """Top-k of attention mass, for each KV head on its own.

    Score of candidate k: mean over rows of p_r(k) * (1 - rest_mass_r), p_r being row r's softmax
    over the candidates. So it is the attention the dense step paid, mass on sink and recent tokens
    counted as spent elsewhere: a row that hardly looks at the candidates hardly votes.
    Higher is better; ties go to the lower position.

    Source: accumulated attention as in H2O (arXiv 2306.14048) and SnapKV (arXiv 2404.14469), here
    per KV head, from the evidence rows of one dense step.
    """

    needs: frozenset[str] = frozenset()
    ranking = Ranking()

    def __init__(self, config: PerHeadConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`; no key norms needed.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1.
        """
        pieces, candidates = head_log_mass_pieces(evidence), evidence.logits.shape[-1]
        return choose_from_pieces(pieces, candidates, budget, evidence.candidate_start)
