"""`fading`: attention mass that fades with the age of a token."""

from __future__ import annotations

import math

from pydantic import Field

from sfi_agent import Evidence, Selection, Settings

__all__ = ["Fading", "FadingConfig"]


class FadingConfig(Settings):
    """Options of `fading`."""

    half_life_tokens: float = Field(
        default=4096.0,
        gt=0.0,
        description="Age difference at which the same attention counts half.",
        json_schema_extra={"unit": "tokens"},
    )


class Fading:
    """Top-k per KV head of attention mass times 0.5 to the power of age / half_life_tokens.

    Score of candidate k: log of the sum over rows of p_r(k) * (1 - rest_mass_r), minus
    age(k) * ln 2 / half_life_tokens, where age counts candidates from the newest one. Higher is
    better, ties go to the lower position.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: FadingConfig) -> None:
        self._loss_per_token = math.log(2.0) / config.half_life_tokens

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`.
            budget: Places per KV head, at least 1.
        """
        import torch

        logits = evidence.logits
        candidates = logits.shape[-1]
        # A row without any visible candidate gives NaN here and must count for nothing.
        row_shares = logits.log_softmax(dim=-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        spent_here = (1.0 - evidence.rest_mass).clamp_min(1e-7).log().unsqueeze(-1)
        mass = (row_shares + spent_here).logsumexp(dim=-2)
        age = torch.arange(candidates - 1, -1, -1, device=logits.device)
        scores = mass - age * self._loss_per_token

        count = min(budget, candidates)
        ranked = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        positions = ranked.sort(dim=-1).values + evidence.candidate_start
        padded = torch.constant_pad_nd(positions, (0, budget - count), -1)
        counts = torch.full(padded.shape[:-1], count, dtype=torch.int64, device=padded.device)
        return Selection(positions=padded, counts=counts)
