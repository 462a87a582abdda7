"""Whether a selector that declares a `Ranking` chooses what that says, by a plain reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from sfi_agent.protocols import Evidence, Ranking, Selector, declared_ranking
from sfi_agent.testing.evidence import make_evidence
from sfi_agent.testing.operator_contract import require

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_ranking"]

_ROUNDING = 1e-3
"""Nats by which two candidates may differ and still be exchanged by float32 arithmetic."""

_START, _CANDIDATES = 9, 60


def check_ranking(selector: Selector, with_norms: bool) -> None:
    """Compare a selector's choices with its `ranking`; selectors without one pass.

    Args:
        selector: The object under test.
        with_norms: Whether its evidence carries key norms.

    Raises:
        AssertionError: It declares something else than a `Ranking`, or chooses otherwise.
    """
    ranking = declared_ranking(selector)
    if ranking is None:
        return
    require(
        isinstance(ranking, Ranking) and ranking.prompt_tail_tokens >= 0,
        selector,
        f"`ranking` must be a Ranking with a tail of at least 0 tokens, got {ranking!r}",
    )
    # Prompts that end before, among and behind the candidates, and none.
    ends = (None, _START - 3, _START + 1, _START + 40, _START + _CANDIDATES + 2)
    for label, evidence in _evidences(with_norms):
        for budget in (1, 2, 13, _CANDIDATES):
            for prompt_end in ends:
                asked = replace(evidence, prompt_end=prompt_end)
                where = f"({label}, budget {budget}, prompt_end {prompt_end})"
                _check_choice(selector, ranking, asked, budget, where)


def _evidences(with_norms: bool) -> Iterator[tuple[str, Evidence]]:
    """Evidence with all kinds of order: smooth, half masked, all equal, and columns repeated."""
    kinds = {"random logits": (2.0, 0.0), "half masked": (2.0, 0.5), "equal logits": (0.0, 0.0)}
    for seed, (label, (scale, masked_share)) in enumerate(kinds.items()):
        yield (
            label,
            make_evidence(
                seed=seed,
                batch=2,
                kv_heads=4,
                rows=3,
                candidates=_CANDIDATES,
                candidate_start=_START,
                logit_scale=scale,
                masked_share=masked_share,
                key_norms=with_norms,
            ),
        )
    random = make_evidence(
        seed=9, kv_heads=2, candidates=_CANDIDATES, candidate_start=_START, key_norms=with_norms
    )
    repeated = random.logits[..., :6].repeat(1, 1, 1, _CANDIDATES // 6)
    yield "every sixth candidate equal", replace(random, logits=repeated)


def _check_choice(
    selector: Selector, ranking: Ranking, evidence: Evidence, budget: int, where: str
) -> None:
    """Nothing chosen is worse than what was left out, by more than rounding."""
    import torch

    selection = selector.select(evidence, budget)
    full = min(budget, _CANDIDATES)
    require(
        bool((selection.counts == full).all()),
        selector,
        f"declares a ranking, which fills its budget, and chose {selection.counts.tolist()} "
        f"of {full} {where}",
    )
    scores = _scores(ranking, evidence, budget)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, selection.positions[..., :full] - evidence.candidate_start, True)
    worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best = scores.masked_fill(chosen, -torch.inf).amax(-1)
    require(
        bool((worst >= best - _ROUNDING).all() if full < _CANDIDATES else True),
        selector,
        f"declares {ranking} and chose a candidate of less mass than one it left {where}",
    )
    # Equal columns have equal sums, and of those the lower positions are chosen.
    kept = scores == torch.inf
    equal = _equal_columns(ranking, evidence) & (kept[..., :, None] == kept[..., None, :])
    later = torch.ones(_CANDIDATES, _CANDIDATES, dtype=torch.bool).tril(-1)
    passed_over = equal & later & chosen[..., :, None] & ~chosen[..., None, :]
    require(
        not bool(passed_over.any()),
        selector,
        f"declares {ranking} and gave a tie to the higher position {where}",
    )


def _scores(ranking: Ranking, evidence: Evidence, budget: int) -> Tensor:
    """Log of the attention mass in float64, `[batch, kv_heads, candidates]`; +inf for the tail."""
    import torch

    logits = evidence.logits.double()
    normaliser = logits.logsumexp(-1, keepdim=True)
    # A row that sees nothing has no mass anywhere.
    share = torch.where(normaliser > -torch.inf, logits - normaliser, -torch.inf)
    rows = share + (1.0 - evidence.rest_mass.double()).log()[..., None]
    if ranking.shared_by_heads:
        scores = rows.flatten(1, 2).logsumexp(1, keepdim=True).expand_as(rows[:, :, 0]).clone()
    else:
        scores = rows.logsumexp(-2)
    if evidence.prompt_end is not None:
        end = evidence.prompt_end - evidence.candidate_start
        kept = min(ranking.prompt_tail_tokens, budget // 2)
        scores[..., max(0, end - kept) : max(0, end)] = torch.inf
    return scores


def _equal_columns(ranking: Ranking, evidence: Evidence) -> Tensor:
    """Which candidates have the same logits in every row, `[batch, kv_heads, candidates, same]`."""
    columns = evidence.logits.transpose(-1, -2)
    equal = (columns[..., :, None, :] == columns[..., None, :, :]).all(-1)
    return equal.all(1, keepdim=True).expand_as(equal) if ranking.shared_by_heads else equal
