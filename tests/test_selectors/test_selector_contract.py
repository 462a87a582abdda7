"""The shipped contract test must catch what it promises to catch: one broken selector each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sfi_agent import Evidence, InputError, Selection
from sfi_agent.testing import check_selector, make_evidence
from sfi_selectors import PerHead, PerHeadConfig

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


def test_evidence_is_reproducible_and_its_arguments_are_checked() -> None:
    one, other = make_evidence(seed=3, masked_share=0.2), make_evidence(seed=3, masked_share=0.2)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.rest_mass, other.rest_mass)
    assert 0 < torch.isinf(one.logits).float().mean() < 0.5
    assert make_evidence(key_norms=False).key_norms is None
    with pytest.raises(InputError, match=r"\(1, 2, 2, 0\)"):
        make_evidence(candidates=0)
