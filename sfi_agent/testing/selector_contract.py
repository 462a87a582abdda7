"""What every selector must keep, as one function that built-ins and third parties run alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sfi_agent.protocols import SELECTOR_NEEDS, Evidence, Selection, Selector
from sfi_agent.testing.evidence import make_evidence
from sfi_agent.testing.operator_contract import check_operators, check_other_device, require
from sfi_agent.testing.ranking_contract import check_ranking

__all__ = ["check_selector"]


@dataclass(frozen=True, slots=True)
class _Case:
    """One evidence with a description for messages."""

    label: str
    evidence: Evidence

    @property
    def candidates(self) -> int:
        return int(self.evidence.logits.shape[-1])


def check_selector(selector: Selector, *, fills_budget: bool = True) -> None:
    """Assert that a selector keeps the contract of `sfi_agent.Selector`.

    Draws evidences of many shapes (batch 1 and 2; 1, 2 and 4 KV heads; 1 to 8 rows; 1 to 200
    candidates; masked rows, equal logits, extreme logits) and asks for several budgets. Checked:
    shapes, dtypes, ascending distinct positions within the candidates, -1 after `counts`, evidence
    left unchanged, equal answers to equal questions, independence of batch mates and of memory
    layout, no host synchronisation, no loop over heads, results on the evidence's device, and, of
    a selector with a `ranking`, that it chooses what that says.
    The selector gets key norms only if its `needs` ask for them.

    Args:
        selector: The object under test. It is called about 250 times.
        fills_budget: Whether it promises min(budget, candidates) places per head, and so
            every candidate at full budget. Pass False for one that may choose fewer.

    Raises:
        AssertionError: The contract is broken; the message says where and how.
    """
    _check_object(selector)
    with_norms = "key_norms" in selector.needs
    for case in _cases(with_norms):
        for budget in sorted({1, (case.candidates + 1) // 2, case.candidates}):
            _check_case(selector, case, budget, fills_budget)
    _check_batch_independence(selector, with_norms)
    _check_memory_layout(selector, with_norms)
    check_operators(selector, with_norms)
    check_other_device(selector, with_norms)
    check_ranking(selector, with_norms)


def _check_object(selector: Selector) -> None:
    require(
        isinstance(selector, Selector),
        selector,
        "is not a Selector; it must have an attribute `needs` and a method "
        "`select(evidence, budget)`",
    )
    needs = selector.needs
    require(
        isinstance(needs, (set, frozenset)) and needs <= SELECTOR_NEEDS,
        selector,
        f"`needs` must be a subset of {sorted(SELECTOR_NEEDS)}, got {needs!r}",
    )


def _cases(with_norms: bool) -> Iterator[_Case]:
    shapes = [
        (1, 1, 1, 1),
        (1, 2, 1, 2),
        (2, 1, 3, 7),
        (1, 4, 2, 33),
        (2, 2, 8, 64),
        (2, 4, 5, 131),
        (1, 1, 4, 200),
    ]
    kinds = [
        ("random logits", 2.0, 0.0),
        ("sharp logits", 30.0, 0.0),
        ("extreme logits, up to about 1e5", 3e4, 0.0),
        ("equal logits", 0.0, 0.0),
        ("half of the entries masked", 2.0, 0.5),
        ("everything masked", 2.0, 1.0),
    ]
    for number, (batch, kv_heads, rows, candidates) in enumerate(shapes):
        for label, scale, masked_share in kinds:
            evidence = make_evidence(
                seed=number,
                batch=batch,
                kv_heads=kv_heads,
                rows=rows,
                candidates=candidates,
                candidate_start=3 * number,
                logit_scale=scale,
                masked_share=masked_share,
                key_norms=with_norms,
            )
            yield _Case(f"{label}, logits {tuple(evidence.logits.shape)}", evidence)
    evidence = make_evidence(seed=99, batch=2, kv_heads=2, rows=4, candidates=50)
    evidence.logits[:, :, 1] = float("-inf")
    evidence.logits[0, 0, :, 10:] = float("-inf")
    spent = replace(evidence, rest_mass=evidence.rest_mass.fill_(1.0))
    if not with_norms:
        spent = replace(spent, key_norms=None)
    yield _Case("one row masked, all mass on sink and recent tokens", spent)


def _copied(evidence: Evidence) -> Evidence:
    norms = evidence.key_norms
    return replace(
        evidence,
        logits=evidence.logits.clone(),
        key_norms=None if norms is None else norms.clone(),
        rest_mass=evidence.rest_mass.clone(),
    )


def _same_evidence(one: Evidence, other: Evidence) -> bool:
    import torch

    same = torch.equal(one.logits, other.logits) and torch.equal(one.rest_mass, other.rest_mass)
    if one.key_norms is None or other.key_norms is None:
        return same
    return same and torch.equal(one.key_norms, other.key_norms)


def _same_selection(one: Selection, other: Selection) -> bool:
    import torch

    return torch.equal(one.positions, other.positions) and torch.equal(one.counts, other.counts)


def _check_case(selector: Selector, case: _Case, budget: int, fills_budget: bool) -> None:
    where = f"({case.label}, budget {budget})"
    before = _copied(case.evidence)
    selection = selector.select(case.evidence, budget)
    require(
        _same_evidence(case.evidence, before),
        selector,
        f"changed the evidence in place {where}; work on copies",
    )
    _check_selection(selector, case, budget, selection, where)
    full = min(budget, case.candidates)
    if fills_budget:
        require(
            bool((selection.counts == full).all()),
            selector,
            f"counts must be min(budget, candidates) = {full}, got "
            f"{selection.counts.tolist()} {where}; pass fills_budget=False if fewer are meant",
        )
    require(
        _same_selection(selection, selector.select(case.evidence, budget)),
        selector,
        f"two calls with the same evidence gave different selections {where}",
    )


def _check_form(
    selector: Selector, name: str, tensor: object, shape: tuple[int, ...], where: str
) -> None:
    import torch

    right = (
        isinstance(tensor, torch.Tensor)
        and tuple(tensor.shape) == shape
        and tensor.dtype == torch.int64
    )
    got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else tensor
    require(
        right, selector, f"`{name}` must be an int64 tensor of shape {shape}, got {got} {where}"
    )


def _check_selection(
    selector: Selector, case: _Case, budget: int, selection: Selection, where: str
) -> None:
    import torch

    heads = tuple(case.evidence.logits.shape[:2])
    _check_form(selector, "positions", selection.positions, (*heads, budget), where)
    _check_form(selector, "counts", selection.counts, heads, where)
    positions, counts = selection.positions, selection.counts
    limit = min(budget, case.candidates)
    require(
        bool(((counts >= 0) & (counts <= limit)).all()),
        selector,
        f"counts must lie between 0 and {limit}, got {counts.tolist()} {where}",
    )
    valid = torch.arange(budget) < counts.unsqueeze(-1)
    first = case.evidence.candidate_start
    inside = (positions >= first) & (positions < first + case.candidates)
    require(
        bool(inside[valid].all()),
        selector,
        f"positions must lie in [{first}, {first + case.candidates}), got "
        f"{positions[valid & ~inside].tolist()[:8]} {where}; they are absolute: add "
        "candidate_start",
    )
    require(
        bool((positions[~valid] == -1).all()),
        selector,
        f"places after the first `counts` must be -1 {where}",
    )
    ascending = positions[..., 1:] > positions[..., :-1]
    require(
        bool(ascending[valid[..., 1:]].all()),
        selector,
        f"the first `counts` positions of each head must be ascending and distinct {where}",
    )


def _check_batch_independence(selector: Selector, with_norms: bool) -> None:
    both = make_evidence(seed=5, batch=2, kv_heads=4, rows=3, candidates=90, key_norms=with_norms)
    together = selector.select(both, 40)
    for mate in range(2):
        norms = both.key_norms
        alone = replace(
            both,
            logits=both.logits[mate : mate + 1],
            key_norms=None if norms is None else norms[mate : mate + 1],
            rest_mass=both.rest_mass[mate : mate + 1],
        )
        part = Selection(
            together.positions[mate : mate + 1].clone(), together.counts[mate : mate + 1].clone()
        )
        require(
            _same_selection(selector.select(alone, 40), part),
            selector,
            f"sequence {mate} of a batch of 2 got another selection than alone",
        )


def _check_memory_layout(selector: Selector, with_norms: bool) -> None:
    import torch

    plain = make_evidence(seed=6, kv_heads=2, rows=3, candidates=90, key_norms=with_norms)
    wide = torch.full((1, 2, 3, 110), 7.0)
    wide[..., 4:94] = plain.logits
    view = replace(plain, logits=wide[..., 4:94])
    require(
        _same_selection(selector.select(plain, 30), selector.select(view, 30)),
        selector,
        "logits that are a view into a wider tensor gave another selection than a copy of them",
    )
