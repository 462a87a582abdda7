"""Whole aligned blocks of tokens, as paged caches store and read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sfi_agent import Evidence, Selection, Settings
from sfi_selectors._evidence import head_log_mass
from sfi_selectors._ranking import choose, keys_around_peaks, ranking_keys

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Page", "PageConfig"]


class PageConfig(Settings):
    """Options of `page`."""

    page_tokens: int = Field(
        default=16,
        ge=1,
        le=512,
        description="Tokens per page; pages begin at absolute positions divisible by it.",
        json_schema_extra={"unit": "tokens"},
    )


class Page:
    """Top pages by their strongest token, for each KV head on its own.

    Pages are aligned to absolute position 0, so a token is always in the same page whatever the
    candidates begin with; the first and the last page may be partial. A page's score is the maximum
    over its tokens of the attention mass (mean over rows of p_r(k) * (1 - rest_mass_r), mass on
    sink and recent tokens not given back to the candidates). The maximum and not the sum: one
    needle must lift its page over pages of even background, and partial pages are not at a
    disadvantage. Ties go to the page at the lower position. What is left of the budget goes
    to the next page, to the tokens nearest to its strongest one.

    Source: page-wise selection by a bound on the page's largest logit in Quest (arXiv 2406.10774);
    here the logits are known, so the maximum is exact.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: PageConfig) -> None:
        self.config = config

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`; no key norms needed.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1, or there are more candidates than can be ranked
                with this page size (over 4 million at the largest size).
        """
        keys = ranking_keys(head_log_mass(evidence))
        if self.config.page_tokens > 1:
            peaks = self._page_peaks(keys, evidence.candidate_start)
            keys = keys_around_peaks(peaks, self.config.page_tokens - 1)
        return choose(keys, budget, evidence.candidate_start)

    def _page_peaks(self, keys: Tensor, start: int) -> Tensor:
        """For every candidate the key of its page's strongest token, `keys`' shape."""
        import torch

        page_tokens = self.config.page_tokens
        candidates = keys.shape[-1]
        before = start % page_tokens
        after = -(before + candidates) % page_tokens
        padded = torch.constant_pad_nd(keys, (before, after), torch.iinfo(keys.dtype).min)
        pages = padded.reshape(*padded.shape[:-1], -1, page_tokens)
        peaks = pages.amax(dim=-1, keepdim=True).expand(pages.shape).flatten(-2)
        return peaks[..., before : before + candidates]
