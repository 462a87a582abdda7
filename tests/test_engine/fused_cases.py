"""Random cases for fused selection, each checked against the selectors that declare a ranking."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from sfi_agent import Evidence, Ranking, Selector, build_selector
from sfi_agent.engine.kernels import kept_range, make_scratch, rank_layer, select_ranked
from sfi_agent.engine.kernels.reference import candidate_range
from sfi_agent.protocols import declared_ranking

DISTINCT_COLUMNS = 5
RANKED: list[dict[str, Any]] = [
    {"name": "per_head"},
    {"name": "top_k"},
    {"name": "question", "question_tokens": 6},
]


def random_evidence(
    choose: random.Random, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, bool]:
    """Logits of whole histories, and whether choices must agree exactly."""
    kind = choose.choice(["smooth", "sharp", "repeated", "constant"])
    logits = torch.randn(shape, device=device) * (8.0 if kind == "sharp" else 2.0)
    if kind == "repeated":
        columns = torch.arange(shape[-1], device=device) * 7 % DISTINCT_COLUMNS
        logits = logits[..., columns].contiguous()
    elif kind == "constant":
        logits.fill_(1.5)
    return logits, kind in ("repeated", "constant")


def check_fused_selection(seed: int, device: torch.device, capacities: list[int]) -> None:
    """Every selector that declares a ranking chooses what the kernels choose, but for rounding."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    layers, batch, heads, group = (choose.choice([1, 2, 3]) for _ in range(4))
    queries, asked = choose.choice([(1, 1), (1, 1), (4, 1), (4, 2)])
    capacity, budget = choose.choice(capacities), choose.choice([1, 2, 9, 40])
    sink, recent = choose.choice([0, 4]), choose.choice([1, 8])
    lengths = [choose.choice([capacity, choose.randint(1, capacity)]) for _ in range(batch)]
    prompt_ends = [choose.choice([0, choose.randint(1, length)]) for length in lengths]
    tokens, ends = torch.tensor(lengths, device=device), torch.tensor(prompt_ends, device=device)
    active = torch.rand(layers, batch, device=device) < 0.8
    shape = (layers, batch, heads, asked * group, capacity)
    logits, exactly = random_evidence(choose, shape, device)
    lse = torch.full((layers, batch, heads * group, queries), float("nan"), device=device)
    for sequence, length in enumerate(lengths):
        newest = logits[:, sequence, ..., :length].logsumexp(-1)
        # Rows are query-major, log-sum-exps head-major.
        by_head = newest.unflatten(-1, (asked, group)).transpose(-1, -2).flatten(1, 2)
        lse[:, sequence, :, -asked:] = by_head
    for entry in RANKED:
        selector = build_selector(entry)
        ranking = declared_ranking(selector)
        assert ranking is not None
        positions, counts = _fused(
            ranking, logits, lse, tokens, ends, budget, sink, recent, active, heads
        )
        assert positions.is_contiguous() and counts.is_contiguous()
        assert positions.shape == (layers, batch, heads, budget)
        assert (counts[~active] == 0).all()
        for layer, sequence in active.nonzero().tolist():
            _check_row(
                selector, logits[layer, sequence], lengths[sequence], prompt_ends[sequence],
                positions[layer, sequence], counts[layer, sequence], sink, recent, exactly,
            )  # fmt: skip


def _fused(
    ranking: Ranking, logits: Tensor, lse: Tensor, tokens: Tensor, ends: Tensor, budget: int,
    sink: int, recent: int, active: Tensor, heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layers, batch, _, _, capacity = logits.shape
    scratch = make_scratch(ranking, layers, batch, heads, capacity, logits.device)
    kept = kept_range(ranking, ends, tokens, budget, sink, recent)
    for layer in range(layers):
        rank_layer(
            ranking, logits[layer], lse[layer], tokens, scratch.layer(layer), sink, recent,
            kept=kept, active=active[layer],
        )  # fmt: skip
    return select_ranked(ranking, scratch, tokens, budget, heads, sink, recent, active=active)


def _check_row(
    selector: Selector, logits: Tensor, length: int, prompt_end: int, positions: Tensor,
    counts: Tensor, sink: int, recent: int, exactly: bool,
) -> None:  # fmt: skip
    """One layer of one sequence: logits `[kv_heads, rows, capacity]`."""
    first, last = candidate_range(length, sink, recent)
    places = min(positions.shape[-1], last - first)
    assert (counts == places).all() and (positions[:, places:] == -1).all()
    if not places:
        return
    whole, candidates = logits[..., :length], logits[..., first:last]
    rest = 1.0 - (candidates.logsumexp(-1) - whole.logsumexp(-1)).exp()
    evidence = Evidence(
        candidates[None], None, rest.clamp(min=0.0)[None], first, prompt_end or None
    )
    expected = selector.select(evidence, places).positions[0]
    found = positions[:, :places]
    if exactly:
        assert torch.equal(found, expected)
        return
    assert (found[:, 1:] > found[:, :-1]).all()
    scores = (whole.double() - whole.double().logsumexp(-1, keepdim=True)).logsumexp(1)
    if declared_ranking(selector) == Ranking(shared_by_heads=True):
        scores = scores.logsumexp(0, keepdim=True).expand_as(scores)
    got, wanted = (scores.gather(1, chosen).sort(-1).values for chosen in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
