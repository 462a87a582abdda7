"""Whole neighbourhoods around the strongest tokens, for copying text verbatim."""

from __future__ import annotations

from pydantic import Field

from sfi_agent import Evidence, Selection, Settings
from sfi_selectors._evidence import head_log_mass
from sfi_selectors._ranking import choose, keys_around_peaks, ranking_keys, sliding_maximum

__all__ = ["Span", "SpanConfig"]


class SpanConfig(Settings):
    """Options of `span`."""

    radius_tokens: int = Field(
        default=16,
        ge=0,
        le=256,
        description="Tokens kept on either side of a strong token; 0 keeps single tokens, "
        "as per_head does.",
        json_schema_extra={"unit": "tokens"},
    )


class Span:
    """Top-k of evidence max-pooled over +-radius positions, for each KV head on its own.

    A candidate's pooled score is the largest attention mass (mean over rows of
    p_r(k) * (1 - rest_mass_r), mass on sink and recent tokens not given back to the candidates)
    within `radius_tokens`; the token that holds it is the candidate's peak. Copying moves its
    pointer token by token: what follows the token attended now is needed next, though nothing
    attends to it yet.

    The budget is spent peak by peak, strongest first (ties: lower position). Where it ends inside a
    neighbourhood, the tokens nearest to the peak stay, of two at equal distance the following one,
    so that a cut span is still contiguous and centred on what was attended.

    Source: pooled evidence as in SnapKV (arXiv 2404.14469), with the order inside a span added.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: SpanConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`; no key norms needed.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1, or there are more candidates than can be ranked
                with this radius (over 4 million at the largest radius).
        """
        radius = self.config.radius_tokens
        keys = ranking_keys(head_log_mass(evidence))
        if radius > 0:
            keys = keys_around_peaks(sliding_maximum(keys, radius), radius)
        return choose(keys, budget, evidence.candidate_start)
