"""`kl_fusion` against the plain reference, and the invariants of its formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import Evidence, InputError
from sfi_agent.testing import make_evidence
from sfi_selectors import KlFusion, KlFusionConfig
from tests.test_selectors import reference

EVIDENCES = st.builds(
    make_evidence,
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 5),
    rows=st.integers(1, 6),
    candidates=st.integers(1, 24),
    candidate_start=st.integers(0, 9),
    logit_scale=st.sampled_from([0.05, 1.0, 4.0]),
    masked_share=st.sampled_from([0.0, 0.0, 0.4, 0.9]),
)
CONFIGS = st.builds(
    KlFusionConfig,
    alpha=st.sampled_from([0.0, 1e-7, 0.02, 0.1, 0.5, 1.0, 3.0]),
    gamma=st.sampled_from([-0.5, 0.0, 0.5, 2.0]),
    norm_weight=st.sampled_from([0.0, 1.0]),
    position_weight=st.sampled_from([0.0, 0.7]),
    position_power=st.sampled_from([1.0, 1.8]),
    position_eta=st.sampled_from([0.0, 0.4]),
    fusion_limit_single=st.sampled_from([0.0, 0.35, 1.0]),
    fusion_limit_multi=st.sampled_from([0.0, 0.25, 1.0]),
    nms_window=st.sampled_from([0, 1, 2, 5, 32]),
    soft_alpha=st.sampled_from([0.0, 0.5, 1.0]),
    cross_head_alpha=st.sampled_from([0.0, 0.85]),
    cross_head_temperature=st.sampled_from([0.5, 2.0]),
)


def assert_close(name: str, computed: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        computed.double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-4,
        atol=2e-4,
        msg=lambda text: f"{name}: {text}",
    )


def assert_chooses_the_best(positions: list[int], start: int, scores: list[float]) -> None:
    """The reference's choice exactly, or another one where rounding decides between equals."""
    chosen = [position - start for position in positions]
    expected = reference.best(scores, len(chosen))
    if chosen != expected:
        threshold = min(scores[k] for k in expected)
        swapped = set(chosen) ^ set(expected)
        # Candidates that nobody sees are all equal, and then the order is exact.
        assert threshold > reference.NEVER
        assert all(abs(scores[k] - threshold) <= 1e-3 + 2e-4 * abs(threshold) for k in swapped)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(evidence=EVIDENCES, config=CONFIGS, data=st.data())
def test_equals_the_plain_reference(
    evidence: Evidence, config: KlFusionConfig, data: st.DataObject
) -> None:
    selector = KlFusion(config)
    scores = selector.scores(evidence)
    candidates = evidence.logits.shape[-1]
    budget = data.draw(st.integers(1, candidates), label="budget")
    selection = selector.select(evidence, budget)
    for sequence in range(evidence.logits.shape[0]):
        plain = reference.kl_fusion(evidence, config, sequence)
        assert_close("f", scores.f[sequence], plain.f)
        assert_close("prior", scores.prior[sequence], plain.prior)
        for head, spread in enumerate(plain.spread):
            # Where f and r are equal any weight gives the same scores, and 0 / 0 decides.
            if spread > 1e-5:
                weight = float(scores.weight[sequence, head])
                assert weight == pytest.approx(plain.weight[head], abs=2e-4)
        assert_close("suppressed", scores.suppressed[sequence], plain.suppressed)
        assert_close("final", scores.final[sequence], plain.final)
        for head, row in enumerate(plain.final):
            positions = selection.positions[sequence, head].tolist()
            assert_chooses_the_best(positions, evidence.candidate_start, row)


def scores_of(evidence: Evidence, **options: Any) -> dict[str, torch.Tensor]:
    scores = KlFusion(KlFusionConfig(**options)).scores(evidence)
    return {name: getattr(scores, name) for name in type(scores).__slots__}


def test_one_row_gives_its_softmax_for_every_alpha() -> None:
    evidence = make_evidence(rows=1, kv_heads=3)
    softmax = evidence.logits.softmax(dim=-1).squeeze(2)
    for alpha in (0.0, 0.2, 0.5, 1.0, 4.0):
        torch.testing.assert_close(scores_of(evidence, alpha=alpha)["f"], softmax)


def test_alpha_one_is_the_mean_of_the_rows_that_see_something() -> None:
    evidence = make_evidence(rows=4)
    evidence.logits[0, 1, 2] = -torch.inf
    softmax = evidence.logits.softmax(dim=-1)
    computed = scores_of(evidence, alpha=1.0)["f"]
    torch.testing.assert_close(computed[0, 0], softmax[0, 0].mean(dim=0))
    torch.testing.assert_close(computed[0, 1], softmax[0, 1, [0, 1, 3]].mean(dim=0))


def test_small_alpha_approaches_the_geometric_mean() -> None:
    evidence = make_evidence(rows=8, logit_scale=4.0)
    limit = scores_of(evidence, alpha=0.0)["f"]
    torch.testing.assert_close(scores_of(evidence, alpha=1e-5)["f"], limit, rtol=2e-3, atol=1e-6)


def test_without_prior_suppression_and_mutex_it_is_top_k_of_f() -> None:
    evidence = make_evidence(kv_heads=4, rows=3, candidates=80, candidate_start=6)
    plain: dict[str, Any] = {"soft_alpha": 0, "cross_head_alpha": 0, "fusion_limit_multi": 0}
    selection = KlFusion(KlFusionConfig(**plain)).select(evidence, 11)
    best = scores_of(evidence, **plain)["f"].topk(11, dim=-1).indices.sort(dim=-1).values + 6
    assert torch.equal(selection.positions, best)


def test_equal_heads_lose_the_same_and_a_single_head_keeps_its_token() -> None:
    """A token that all heads score alike loses cross_head_alpha * log(heads)."""
    one_head = make_evidence(kv_heads=1)
    assert one_head.key_norms is not None
    same = replace(
        one_head,
        logits=one_head.logits.expand(-1, 4, -1, -1).contiguous(),
        key_norms=one_head.key_norms.expand(-1, 4, -1).contiguous(),
        rest_mass=one_head.rest_mass.expand(-1, 4, -1).contiguous(),
    )
    rows = scores_of(same)
    lost = rows["suppressed"] - rows["final"]
    torch.testing.assert_close(lost, torch.full_like(lost, 0.85 * 1.3862944))


def test_suppression_doubles_the_distance_to_the_local_maximum() -> None:
    off = scores_of(make_evidence(kv_heads=1), soft_alpha=0.0)["final"][0, 0]
    on = scores_of(make_evidence(kv_heads=1), soft_alpha=1.0, nms_window=64 * 2)["final"][0, 0]
    torch.testing.assert_close(on - off.max(), 2 * (off - off.max()))


def test_the_prior_prefers_small_norms_and_early_positions() -> None:
    evidence = make_evidence(kv_heads=1, candidates=40)
    assert evidence.key_norms is not None
    evidence.key_norms.fill_(2.0)
    prior = scores_of(evidence)["prior"][0, 0]
    assert (prior[1:] < prior[:-1]).all()
    assert prior[-1] < prior[-2] / 100  # the published veto of the last candidate
    evidence.key_norms[0, 0, 20] = 1.0
    assert scores_of(evidence)["prior"][0, 0, 20] > prior[20]


def test_a_head_that_sees_nothing_has_uniform_evidence() -> None:
    evidence = make_evidence(kv_heads=3, candidates=10)
    evidence.logits[0, 1] = -torch.inf
    rows = scores_of(evidence)
    torch.testing.assert_close(rows["f"][0, 1], torch.full((10,), 0.1))
    assert all(torch.isfinite(rows[name]).all() for name in rows)


def test_evidence_without_key_norms_is_a_typed_error() -> None:
    with pytest.raises(InputError, match="key_norms"):
        KlFusion(KlFusionConfig()).select(make_evidence(key_norms=False), 4)
