"""The shipped contract test must catch what it promises to catch: one broken selector each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sfi_agent import Evidence, InputError, Ranking, Selection, build_selector
from sfi_agent.protocols import declared_ranking
from sfi_agent.testing import check_selector, make_evidence
from sfi_selectors import PerHead, PerHeadConfig, TopK, TopKConfig

Choose = Callable[[Evidence, int], Selection]


def good(evidence: Evidence, budget: int) -> Selection:
    return PerHead(PerHeadConfig()).select(evidence, budget)


class Wrapped:
    """A selector made of a function."""

    def __init__(self, choose: Choose, needs: frozenset[str] = frozenset()) -> None:
        self.needs = needs
        self._choose = choose

    def select(self, evidence: Evidence, budget: int) -> Selection:
        return self._choose(evidence, budget)


def relative(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions - evidence.candidate_start, right.counts)


def descending(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions.flip(-1), right.counts)


def repeated(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions[..., :1].expand(-1, -1, budget).clone(), right.counts)


def narrow(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions.int(), right.counts)


def flat(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions[:, 0], right.counts)


def unpadded(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions, right.counts // 2)


def too_many(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions, right.counts + 1)


def half_empty(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    counts = (right.counts + 1) // 2
    kept = torch.arange(budget, device=counts.device) < counts.unsqueeze(-1)
    return Selection(right.positions.where(kept, -1), counts)


def spoiling(evidence: Evidence, budget: int) -> Selection:
    result = good(evidence, budget)
    evidence.logits.sub_(1.0)
    return result


def coupled(evidence: Evidence, budget: int) -> Selection:
    mixed = evidence.logits + evidence.logits.flip(0)
    return good(Evidence(mixed, None, evidence.rest_mass, evidence.candidate_start), budget)


def reads_back(evidence: Evidence, budget: int) -> Selection:
    if evidence.rest_mass.mean() > 2:
        return descending(evidence, budget)
    return good(evidence, budget)


def masks(evidence: Evidence, budget: int) -> Selection:
    evidence.rest_mass[evidence.rest_mass > 0.5].sum()
    return good(evidence, budget)


def lists(evidence: Evidence, budget: int) -> Selection:
    evidence.rest_mass.tolist()
    return good(evidence, budget)


def loops(evidence: Evidence, budget: int) -> Selection:
    parts = [
        good(
            Evidence(
                evidence.logits[:, head : head + 1],
                None,
                evidence.rest_mass[:, head : head + 1],
                evidence.candidate_start,
            ),
            budget,
        )
        for head in range(evidence.logits.shape[1])
    ]
    return Selection(
        torch.cat([part.positions for part in parts], dim=1),
        torch.cat([part.counts for part in parts], dim=1),
    )


def on_the_host(evidence: Evidence, budget: int) -> Selection:
    right = good(evidence, budget)
    return Selection(right.positions, torch.full(right.counts.shape, budget, dtype=torch.int64))


def peeks_at_norms(evidence: Evidence, budget: int) -> Selection:
    assert evidence.key_norms is not None, "no norms"
    return good(evidence, budget)


class Forgetful:
    """Alternates between two answers."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._odd = False

    def select(self, evidence: Evidence, budget: int) -> Selection:
        self._odd = not self._odd
        flipped = Evidence(
            -evidence.logits.clamp(min=-1e6),
            None,
            evidence.rest_mass,
            evidence.candidate_start,
        )
        return good(flipped if self._odd else evidence, budget)


BROKEN: list[tuple[Choose, str]] = [
    (relative, "positions must lie in"),
    (descending, "ascending and distinct"),
    (repeated, "ascending and distinct"),
    (narrow, "`positions` must be an int64 tensor"),
    (flat, "`positions` must be an int64 tensor of shape"),
    (unpadded, "must be -1"),
    (too_many, "counts must lie between"),
    (half_empty, "counts must be min"),
    (spoiling, "changed the evidence"),
    (coupled, "of a batch of 2 got another selection than alone"),
    (reads_back, "synchronises with the host: operator _local_scalar_dense"),
    (masks, "indexes with a mask"),
    (lists, "another device"),
    (loops, "loops over heads"),
    (on_the_host, "`counts` must stay on the evidence's device"),
]


@pytest.mark.parametrize(
    ("choose", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_selector_is_caught(choose: Choose, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_selector(Wrapped(choose))


def test_a_selector_with_hidden_state_is_caught() -> None:
    with pytest.raises(AssertionError, match="two calls with the same evidence"):
        check_selector(Forgetful())


def test_undeclared_needs_are_not_served() -> None:
    with pytest.raises(AssertionError, match="no norms"):
        check_selector(Wrapped(peeks_at_norms))
    check_selector(Wrapped(peeks_at_norms, needs=frozenset({"key_norms"})))


def test_unknown_needs_and_other_objects_are_refused() -> None:
    with pytest.raises(AssertionError, match="subset of"):
        check_selector(Wrapped(good, needs=frozenset({"values"})))
    with pytest.raises(AssertionError, match="is not a Selector"):
        check_selector(object())  # type: ignore[arg-type]


def test_fewer_places_are_fine_when_announced() -> None:
    check_selector(Wrapped(half_empty), fills_budget=False)


class Promising(Wrapped):
    """A selector made of a function, with a ranking that may or may not be true of it."""

    def __init__(self, choose: Choose, ranking: Ranking) -> None:
        super().__init__(choose)
        self.ranking = ranking


def shared(evidence: Evidence, budget: int) -> Selection:
    return TopK(TopKConfig()).select(evidence, budget)


def high_ties(evidence: Evidence, budget: int) -> Selection:
    """As `per_head`, with ties to the higher position."""
    flipped = replace(evidence, logits=evidence.logits.flip(-1), prompt_end=None)
    right, last = good(flipped, budget), evidence.logits.shape[-1] - 1
    mirrored = (2 * evidence.candidate_start + last - right.positions).flip(-1)
    return Selection(mirrored, right.counts)


def without_rest(evidence: Evidence, budget: int) -> Selection:
    return good(replace(evidence, rest_mass=evidence.rest_mass * 0.0), budget)


UNTRUE: list[tuple[Choose, Ranking, str]] = [
    (good, Ranking(shared_by_heads=True), "less mass than one it left"),
    (shared, Ranking(), "less mass than one it left"),
    (good, Ranking(prompt_tail_tokens=5), "less mass than one it left"),
    (without_rest, Ranking(), "less mass than one it left"),
    (high_ties, Ranking(), "a tie to the higher position"),
    (half_empty, Ranking(), "fills its budget"),
    (good, Ranking(prompt_tail_tokens=-1), "at least 0 tokens"),
]


@pytest.mark.parametrize(("choose", "ranking", "message"), UNTRUE)
def test_a_ranking_that_is_not_true_is_caught(
    choose: Choose, ranking: Ranking, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_selector(Promising(choose, ranking), fills_budget=False)


def test_a_ranking_that_is_true_passes() -> None:
    check_selector(Promising(good, Ranking()))
    check_selector(Promising(shared, Ranking(shared_by_heads=True)))


def test_which_selectors_declare_a_ranking() -> None:
    names = ["per_head", "top_k", "question", "span", "window", "cumulative_mass", "random"]
    declared = {name: declared_ranking(build_selector({"name": name})) for name in names}
    assert {name: ranking for name, ranking in declared.items() if ranking is not None} == {
        "per_head": Ranking(),
        "top_k": Ranking(shared_by_heads=True),
        "question": Ranking(prompt_tail_tokens=64),
    }


def test_a_select_of_its_own_inherits_no_ranking() -> None:
    class Other(PerHead):
        def select(self, evidence: Evidence, budget: int) -> Selection:
            return half_empty(evidence, budget)

    class Same(PerHead):
        pass

    class Declared(Other):
        ranking = Ranking()

    kinds: list[type[PerHead]] = [Other, Same, Declared]
    found = [declared_ranking(kind(PerHeadConfig())) for kind in kinds]
    assert found == [None, Ranking(), Ranking()]
    watched = PerHead(PerHeadConfig())
    watched.select = good  # type: ignore[method-assign]
    assert declared_ranking(watched) is None
    assert declared_ranking(Promising(good, Ranking())) == Ranking()


def test_evidence_is_reproducible_and_its_arguments_are_checked() -> None:
    one, other = make_evidence(seed=3, masked_share=0.2), make_evidence(seed=3, masked_share=0.2)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.rest_mass, other.rest_mass)
    assert 0 < torch.isinf(one.logits).float().mean() < 0.5
    assert make_evidence(key_norms=False).key_norms is None
    with pytest.raises(InputError, match=r"\(1, 2, 2, 0\)"):
        make_evidence(candidates=0)
