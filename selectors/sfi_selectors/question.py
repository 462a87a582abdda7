"""Top-k per KV head that never lets go of the end of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sfi_agent import Evidence, Ranking, Selection, Settings
from sfi_selectors._evidence import head_log_mass_pieces
from sfi_selectors._ranking import choose_from_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Question", "QuestionConfig"]


class QuestionConfig(Settings):
    """Options of `question`."""

    question_tokens: int = Field(
        default=64,
        ge=0,
        description="Last tokens of the prompt that are always selected once they are no longer "
        "recent; at most half of the budget goes to them.",
        json_schema_extra={"unit": "tokens"},
    )


class Question:
    """`per_head`, with the end of the prompt kept in memory for as long as the answer runs.

    Once an answer is longer than the recent part, the question is visible only if it is selected,
    and the query at the start of a sentence looks at a word or two of it. A model that has lost its
    question is wrong and sure of it, so that retries do not help (docs/policy_study.md).

    Candidates at positions `prompt_end - question_tokens ... prompt_end - 1` come first, the later
    ones before the earlier ones where half of the budget does not hold them all; the other places
    go to the highest attention mass, as in `per_head`. Evidence without a prompt end, and prompts
    that are still recent, are treated as by `per_head`.

    Source: this project; a kept observation window is what SnapKV (arXiv 2404.14469) leaves in an
    evicted cache.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: QuestionConfig) -> None:
        self.config = config

    @property
    def ranking(self) -> Ranking:
        return Ranking(prompt_tail_tokens=self.config.question_tokens)

    def select(self, evidence: Evidence, budget: int) -> Selection:
        """Choose exactly min(budget, candidates) positions per KV head.

        Args:
            evidence: Logits `[batch, kv_heads, rows, candidates]`; no key norms needed.
            budget: Places per KV head, at least 1.

        Raises:
            InputError: The budget is below 1.
        """
        candidates = evidence.logits.shape[-1]
        pieces = self._question_first(evidence, candidates, budget)
        return choose_from_pieces(pieces, candidates, budget, evidence.candidate_start)

    def _question_first(
        self, evidence: Evidence, candidates: int, budget: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Scores piece by piece, those of the kept end of the prompt raised above all others."""
        start = end = 0
        if evidence.prompt_end is not None:
            end = min(evidence.prompt_end - evidence.candidate_start, candidates)
            kept = min(self.config.question_tokens, budget // 2)
            start = max(0, evidence.prompt_end - evidence.candidate_start - kept)
        for first, scores in head_log_mass_pieces(evidence):
            low, high = max(start - first, 0), min(end - first, scores.shape[-1])
            if low < high:
                scores[..., low:high] = float("inf")
            yield first, scores
