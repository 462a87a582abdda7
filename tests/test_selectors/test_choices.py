"""What each selector is for, on evidence with a known right answer, and against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import Evidence, InputError
from sfi_agent.testing import make_evidence
from tests.test_selectors import reference
from tests.test_selectors.matrix import build

START = 10


def evidence_of(
    *heads: list[list[float]], rest: list[list[float]] | None = None, start: int = START
) -> Evidence:
    """One sequence; each head is a list of rows of attention probabilities (0 is masked)."""
    probabilities = torch.tensor(heads).unsqueeze(0)
    mass = torch.zeros(probabilities.shape[:3]) if rest is None else torch.tensor(rest).unsqueeze(0)
    return Evidence(probabilities.log(), None, mass, start)


def peaks(candidates: int, heights: dict[int, float], start: int = START) -> Evidence:
    """One head, one row, background 1 and the given relative heights."""
    row = torch.ones(candidates)
    for index, height in heights.items():
        row[index] = height
    return Evidence(row.log().reshape(1, 1, 1, -1), None, torch.zeros(1, 1, 1), start)


def chosen(name: str, evidence: Evidence, budget: int, **options: object) -> list[list[int]]:
    """Candidate indices per head of the first sequence."""
    selection = build(name, **options).select(evidence, budget)
    return [
        [position - evidence.candidate_start for position in head if position >= 0]
        for head in selection.positions[0].tolist()
    ]


def test_per_head_gives_each_head_its_own_tokens() -> None:
    evidence = evidence_of([[0.1, 0.7, 0.1, 0.1]], [[0.1, 0.1, 0.2, 0.6]])
    assert chosen("per_head", evidence, 1) == [[1], [3]]
    assert chosen("per_head", evidence, 2) == [[0, 1], [2, 3]]


def test_question_keeps_the_end_of_the_prompt() -> None:
    evidence = make_evidence(seed=5, candidates=40, candidate_start=4)
    selector = build("question", question_tokens=6)
    plain = build("per_head").select(evidence, 16).positions
    assert torch.equal(selector.select(evidence, 16).positions, plain)
    for prompt_end, kept in ((30, range(24, 30)), (46, range(40, 44)), (60, range(0))):
        chosen = selector.select(replace(evidence, prompt_end=prompt_end), 16).positions
        for head in chosen[0]:
            assert set(kept) <= set(head.tolist())
        if not kept:
            assert torch.equal(chosen, plain)
    few = selector.select(replace(evidence, prompt_end=30), 4).positions
    for head in few[0]:
        assert {28, 29} <= set(head.tolist()) and len(set(head.tolist())) == 4
    none = build("question", question_tokens=0).select(replace(evidence, prompt_end=30), 16)
    assert torch.equal(none.positions, plain)


@pytest.mark.parametrize("name", ["per_head", "top_k", "cumulative_mass", "span", "page"])
def test_a_row_that_looks_at_the_sink_hardly_votes(name: str) -> None:
    """Row 0 is sharper, but spends 99 % elsewhere; normalising it over candidates would win."""
    rows = [[0.9, 0.04, 0.03, 0.03], [0.1, 0.1, 0.1, 0.7]]
    options = {"page": {"page_tokens": 1}, "span": {"radius_tokens": 0}}.get(name, {})
    assert chosen(name, evidence_of(rows, rest=[[0.99, 0.0]]), 1, **options) == [[3]]
    assert chosen(name, evidence_of(rows), 1, **options) == [[0]]


def test_a_rest_mass_of_one_still_ranks() -> None:
    """In float32 all mass may seem to lie on the sink; what is left is still in order."""
    evidence = evidence_of([[0.1, 0.2, 0.7]], rest=[[1.0]])
    assert chosen("per_head", evidence, 1) == [[2]]


def test_probabilities_that_underflow_still_rank() -> None:
    logits = torch.tensor([0.0, -500.0, -300.0, -400.0]).reshape(1, 1, 1, 4)
    evidence = Evidence(logits, None, torch.zeros(1, 1, 1), 0)
    assert chosen("per_head", evidence, 3) == [[0, 2, 3]]


def test_top_k_shares_one_set_weighted_by_mass() -> None:
    first = [[0.6, 0.4, 0.0, 0.0]]
    second = [[0.0, 0.0, 0.9, 0.1]]
    assert chosen("top_k", evidence_of(first, second), 2) == [[0, 2], [0, 2]]
    busy_elsewhere = evidence_of(first, second, rest=[[0.0], [0.8]])
    assert chosen("top_k", busy_elsewhere, 2) == [[0, 1], [0, 1]]


def test_cumulative_mass_takes_the_smallest_sufficient_set() -> None:
    evidence = evidence_of([[0.05, 0.5, 0.15, 0.3]], [[0.25, 0.25, 0.25, 0.25]])
    for mass, expected in {
        0.4: [[1], [0, 1]],
        0.6: [[1, 3], [0, 1, 2]],
        0.9: [[1, 2, 3], [0, 1, 2, 3]],
        1.0: [[0, 1, 2, 3], [0, 1, 2, 3]],
    }.items():
        assert chosen("cumulative_mass", evidence, 4, mass=mass) == expected
    assert chosen("cumulative_mass", evidence, 2, mass=0.9) == [[1, 3], [0, 1]]


def test_cumulative_mass_measures_the_share_of_the_candidates() -> None:
    """A head with 90 % on the sink needs as many places as one with 0 % and the same shape."""
    row = [[0.05, 0.5, 0.15, 0.3]]
    evidence = evidence_of(row, row, rest=[[0.9], [0.0]])
    assert chosen("cumulative_mass", evidence, 4, mass=0.6) == [[1, 3], [1, 3]]


def test_mass_one_selects_candidates_whose_probability_underflows() -> None:
    logits = torch.linspace(0.0, -5000.0, 300).reshape(1, 1, 1, -1)
    evidence = Evidence(logits, None, torch.zeros(1, 1, 1), 0)
    assert chosen("cumulative_mass", evidence, 300, mass=1.0) == [list(range(300))]
    assert len(chosen("cumulative_mass", evidence, 300, mass=0.999999)[0]) < 10


def test_span_keeps_whole_neighbourhoods_of_the_strongest_peaks() -> None:
    evidence = peaks(200, {50: 100.0, 120: 60.0, 150: 30.0})
    both = [*range(46, 55), *range(116, 125)]
    assert chosen("span", evidence, 18, radius_tokens=4) == [both]
    assert chosen("span", evidence, 33) == [list(range(34, 67))]


def test_a_cut_span_is_centred_and_leans_forward() -> None:
    evidence = peaks(100, {40: 100.0, 80: 50.0})
    assert chosen("span", evidence, 1) == [[40]]
    assert chosen("span", evidence, 2) == [[40, 41]]
    assert chosen("span", evidence, 3) == [[39, 40, 41]]
    assert chosen("span", evidence, 6, radius_tokens=1) == [[39, 40, 41, 79, 80, 81]]
    assert chosen("span", evidence, 5, radius_tokens=1) == [[39, 40, 41, 80, 81]]


def test_span_holds_the_continuation_that_single_tokens_miss() -> None:
    """A pointer at 60 will move on to 61...76, which nothing attends to yet."""
    noise = {index: 2.0 for index in range(0, 200, 3)}
    evidence = peaks(200, {**noise, 60: 500.0})
    continuation = set(range(60, 77))
    assert continuation <= set(chosen("span", evidence, 40)[0])
    assert not continuation <= set(chosen("per_head", evidence, 40)[0])


def test_span_stops_at_the_ends() -> None:
    assert chosen("span", peaks(50, {0: 9.0}), 5, radius_tokens=4) == [[0, 1, 2, 3, 4]]
    assert chosen("span", peaks(50, {49: 9.0}), 5, radius_tokens=4) == [[45, 46, 47, 48, 49]]


def test_page_takes_aligned_blocks() -> None:
    """Candidates start at 10: pages of 8 begin at indices 6, 14, 22; the first one is partial."""
    evidence = peaks(60, {16: 50.0, 3: 20.0})
    assert chosen("page", evidence, 8, page_tokens=8) == [list(range(14, 22))]
    assert chosen("page", evidence, 14, page_tokens=8) == [[*range(6), *range(14, 22)]]


def test_page_spends_the_rest_of_the_budget_around_the_next_peak() -> None:
    evidence = peaks(60, {16: 50.0, 35: 20.0})
    assert chosen("page", evidence, 11, page_tokens=8) == [[*range(14, 22), 34, 35, 36]]


def test_one_needle_lifts_its_page_over_even_background() -> None:
    row = torch.full((32,), 0.05)
    row[:16] = 3.0
    row[20] = 10.0
    evidence = Evidence(row.log().reshape(1, 1, 1, -1), None, torch.zeros(1, 1, 1), 0)
    assert chosen("page", evidence, 16) == [list(range(16, 32))]


def test_window_selects_nothing() -> None:
    selection = build("window").select(make_evidence(batch=2), 8)
    assert (selection.positions == -1).all() and (selection.counts == 0).all()


def test_more_candidates_than_can_be_ranked_are_refused() -> None:
    huge = torch.zeros(1, device="meta").expand(1, 1, 1, (1 << 22) + 1)
    evidence = Evidence(huge, None, torch.zeros((1, 1, 1), device="meta"), 0)
    with pytest.raises(InputError, match="at most 4194304 candidates"):
        build("span", radius_tokens=256).select(evidence, 8)


def random_set(seed: int | None = None, **shape: Any) -> list[list[int]]:
    return chosen("random", make_evidence(kv_heads=3, **shape), 20, seed=seed)


def test_random_depends_on_seed_shape_and_head_alone() -> None:
    base = random_set(candidates=100)
    assert random_set(candidates=100, seed=0) == base
    assert chosen("random", make_evidence(kv_heads=3, candidates=100, logit_scale=9.0), 20) == base
    others = [random_set(candidates=100, seed=seed) for seed in (1, -1, 2**40, 2**40 + 1)]
    others.append(random_set(candidates=101))
    others.append(random_set(candidates=100, candidate_start=5))
    others.append([base[1], base[2], base[0]])
    for other in others:
        for one, two in zip(base, other, strict=True):
            # Two independent sets of 20 out of 100 share 4 on average; 13 is beyond all chance.
            assert len(set(one) & set(two)) < 13
    batch = build("random").select(make_evidence(batch=2, candidates=100), 20).positions
    assert torch.equal(batch[0], batch[1])


def test_random_is_uniform_over_candidates() -> None:
    """2000 draws of 20 out of 100: each candidate 400 times, standard deviation about 18."""
    hits = torch.zeros(100, dtype=torch.int64)
    for seed in range(20):
        selection = build("random", seed=seed).select(
            make_evidence(kv_heads=100, candidates=100), 20
        )
        hits += torch.bincount(selection.positions.flatten() - 4, minlength=100)
    assert hits.sum() == 2000 * 20
    assert hits.min() > 400 - 90 and hits.max() < 400 + 90


EVIDENCES = st.builds(
    make_evidence,
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    rows=st.integers(1, 5),
    candidates=st.integers(1, 40),
    candidate_start=st.integers(0, 40),
    logit_scale=st.sampled_from([1.0, 5.0]),
    masked_share=st.sampled_from([0.0, 0.0, 0.3]),
    key_norms=st.just(False),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(evidence=EVIDENCES, size=st.integers(0, 12), data=st.data())
def test_choices_equal_the_plain_reference(
    evidence: Evidence, size: int, data: st.DataObject
) -> None:
    start = evidence.candidate_start
    budget = data.draw(st.integers(1, evidence.logits.shape[-1]), label="budget")
    selections = {
        "per_head": build("per_head").select(evidence, budget),
        "top_k": build("top_k").select(evidence, budget),
        "cumulative_mass": build("cumulative_mass", mass=0.7).select(evidence, budget),
        "span": build("span", radius_tokens=size).select(evidence, budget),
        "page": build("page", page_tokens=size + 1).select(evidence, budget),
    }
    for sequence in range(evidence.logits.shape[0]):
        masses = reference.head_mass(evidence, sequence)
        visible = [
            sum(max(row) > reference.NEVER for row in head)
            for head in evidence.logits[sequence].tolist()
        ]
        together = [
            sum(mass * count for mass, count in zip(column, visible, strict=True))
            for column in zip(*masses, strict=True)
        ]
        for head, mass in enumerate(masses):
            expected = {
                "per_head": reference.best(mass, budget),
                "top_k": reference.best(together, budget),
                "cumulative_mass": reference.smallest_set(mass, budget, 0.7),
                "span": reference.span(mass, budget, size),
                "page": reference.page(mass, budget, size + 1, start),
            }
            for name, indices in expected.items():
                count = int(selections[name].counts[sequence, head])
                positions = selections[name].positions[sequence, head, :count]
                assert (positions - start).tolist() == indices, name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 20),
    candidates=st.integers(2, 150),
    name=st.sampled_from(["per_head", "top_k", "cumulative_mass"]),
)
def test_of_equal_columns_the_lower_is_chosen_first(
    seed: int, rows: int, candidates: int, name: str
) -> None:
    """Columns repeat at random places; a copy may be chosen only if all earlier copies are."""
    distinct = make_evidence(seed=seed, rows=rows, candidates=4, key_norms=False)
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(4, (candidates,), generator=generator)
    evidence = Evidence(distinct.logits[..., kinds], None, distinct.rest_mass, 0)
    for indices in chosen(name, evidence, max(1, candidates // 2)):
        for kind in range(4):
            copies = [k for k in range(candidates) if kinds[k] == kind]
            taken = [k for k in copies if k in indices]
            assert taken == copies[: len(taken)]
