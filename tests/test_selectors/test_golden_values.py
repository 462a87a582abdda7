"""The worked examples of the published selector: closed-form inputs, printed intermediate rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sfi_agent import Evidence
from sfi_selectors import KlFusion, KlFusionConfig

Rows = dict[int, list[float]]


@dataclass(frozen=True)
class Example:
    """Evidence, options and the expected rows by KV head; the keys are `KlFusionScores` fields."""

    evidence: Evidence
    config: KlFusionConfig
    budget: int
    chosen: list[list[int]]
    weight: list[float]
    rows: dict[str, Rows]


def _axes(*shape: int, first: int) -> list[torch.Tensor]:
    """Index tensors of a grid whose last axis counts from `first`, float64."""
    sizes = [torch.arange(size, dtype=torch.float64) for size in shape]
    sizes[-1] = sizes[-1] + first
    return list(torch.meshgrid(*sizes, indexing="ij"))


def _evidence(logits: torch.Tensor, norms: torch.Tensor, start: int) -> Evidence:
    heads, candidates = norms.shape
    flat = logits.reshape(1, heads, -1, candidates).float()
    return Evidence(
        logits=flat,
        key_norms=norms.float().unsqueeze(0),
        rest_mass=torch.zeros(flat.shape[:3]),
        candidate_start=start,
    )


def example_a() -> Example:
    """Three heads of two query heads: the cross-head step acts, the clip is 0.25."""
    h, g, k = _axes(3, 2, 6, first=2)
    logits = 2 * torch.sin(1 + 3 * h + 5 * g + 7 * k)
    norms = (1 + 0.25 * ((h + 2 * k) % 5))[:, 0]
    return Example(
        evidence=_evidence(logits, norms, start=2),
        config=KlFusionConfig(nms_window=2),
        budget=3,
        chosen=[[2, 3, 4], [5, 6, 7], [2, 3, 4]],
        weight=[0.25, 0.25, 0.25],
        rows={
            "f": {
                0: [0.512480, 0.284804, 0.102545, 0.0341222, 0.0224739, 0.0435745],
                1: [0.0142214, 0.0253555, 0.0808834, 0.213826, 0.337380, 0.328333],
                2: [0.456333, 0.319042, 0.138381, 0.0436001, 0.0192085, 0.0234355],
            },
            "prior": {0: [0.221280, 0.257243, 0.189959, 0.206649, 0.124804, 6.49221e-05]},
            "suppressed": {
                0: [-0.821709, -1.73918, -2.88808, -3.03705, -3.51010, -3.80556],
                1: [-2.44273, -2.88400, -2.94470, -1.89677, -1.26872, -1.53392],
                2: [-0.890417, -1.56965, -2.37302, -3.41036, -3.79439, -4.87993],
            },
            "final": {
                0: [-1.56969, -2.56839, -3.89407, -4.12543, -4.86691, -5.12064],
                1: [-3.87965, -4.19977, -3.97475, -2.50053, -1.67294, -1.88356],
                2: [-1.66760, -2.32682, -3.16010, -4.65739, -5.27202, -6.65162],
            },
        },
    )


def example_b() -> Example:
    """Two heads: no cross-head step. Four flat rows, the weight between its bounds and at 0."""
    h, w, g, k = _axes(2, 2, 2, 10, first=2)
    logits = (2 - h) * torch.cos(1 + 2 * h + 3 * g + w + 5 * k)
    norms = (2 + 0.5 * ((3 * h + k) % 4))[:, 0, 0]
    final: Rows = {
        0: [
            *(-2.40245, -2.18038, -2.22775, -2.88447, -2.12691),
            *(-2.69143, -2.21830, -2.54887, -3.09200, -2.28917),
        ],
        1: [
            *(-2.48391, -2.23967, -2.37280, -2.23001, -2.56779),
            *(-2.44260, -2.24726, -2.35718, -2.23511, -2.59405),
        ],
    }
    return Example(
        evidence=_evidence(logits, norms, start=2),
        config=KlFusionConfig(nms_window=4),
        budget=4,
        chosen=[[3, 4, 6, 8], [3, 5, 8, 10]],
        weight=[0.168442, 0.0],
        rows={
            "f": {
                0: [
                    *(0.0930050, 0.110503, 0.104301, 0.0715077, 0.121085),
                    *(0.0895962, 0.115545, 0.0973882, 0.0751961, 0.121872),
                ]
            },
            "prior": {
                0: [
                    *(0.142116, 0.126340, 0.157986, 0.131536, 0.109921),
                    *(0.0913398, 0.105665, 0.0793548, 0.0557021, 3.86030e-05),
                ]
            },
            "suppressed": final,
            "final": final,
        },
    )


def example_c() -> Example:
    """One row per head, so f is the softmax itself, and the clip is 0.35."""
    h, k = _axes(3, 9, first=1)
    logits = 3 * torch.sin(2 + 2 * h + 3 * k)
    norms = 1 + 0.2 * ((2 * h + 3 * k) % 7)
    return Example(
        evidence=_evidence(logits, norms, start=1),
        config=KlFusionConfig(nms_window=6),
        budget=4,
        chosen=[[2, 4, 6, 8], [1, 3, 5, 8], [3, 5, 7, 9]],
        weight=[0.35, 0.35, 0.35],
        rows={
            "suppressed": {
                0: [
                    *(-4.26082, -1.41607, -4.35535, -1.44908, -4.58621),
                    *(-1.88403, -5.00347, -2.53782, -11.5030),
                ],
                1: [
                    *(-1.12575, -4.17207, -2.27598, -4.04029, -2.86783),
                    *(-3.66307, -3.44201, -2.23734, -6.72168),
                ],
                2: [
                    *(-2.32344, -4.00391, -2.49792, -4.46161, -2.03643),
                    *(-4.81007, -1.53151, -5.52288, -1.54912),
                ],
            },
            "final": {
                0: [
                    *(-6.07278, -1.77547, -5.92782, -1.79115, -6.23286),
                    *(-2.30577, -6.85755, -3.27732, -15.8005),
                ],
                1: [
                    *(-1.60531, -5.70277, -2.96472, -5.48362, -3.78417),
                    *(-4.84089, -4.63247, -2.84914, -8.98716),
                ],
                2: [
                    *(-3.31201, -5.46315, -3.28098, -6.08402, -2.59943),
                    *(-6.47536, -1.91001, -7.53103, -1.61626),
                ],
            },
        },
    )


EXAMPLES = [example_a(), example_b(), example_c()]


def _printed_digits(value: float) -> float:
    """Half a unit of the sixth significant digit: how far a printed value may be off."""
    return 0.5 * 10.0 ** (len(str(int(abs(value)))) - 6) if abs(value) >= 1 else 5e-7


@pytest.mark.parametrize("example", EXAMPLES, ids=["a", "b", "c"])
def test_intermediate_rows(example: Example) -> None:
    scores = KlFusion(example.config).scores(example.evidence)
    assert scores.weight[0].tolist() == pytest.approx(example.weight, abs=1e-5)
    for name, rows in example.rows.items():
        computed = getattr(scores, name)
        assert computed.dtype == torch.float32
        for head, expected in rows.items():
            for value, printed in zip(computed[0, head].tolist(), expected, strict=True):
                assert abs(value - printed) <= 1e-5 + _printed_digits(printed), (name, head)


@pytest.mark.parametrize("example", EXAMPLES, ids=["a", "b", "c"])
def test_chosen_positions(example: Example) -> None:
    selection = KlFusion(example.config).select(example.evidence, example.budget)
    assert selection.positions[0].tolist() == example.chosen
    assert (selection.counts == example.budget).all()


@pytest.mark.parametrize("example", EXAMPLES, ids=["a", "b", "c"])
def test_a_batch_of_examples_is_the_example_twice(example: Example) -> None:
    one = example.evidence
    assert one.key_norms is not None
    twice = Evidence(
        logits=one.logits.repeat(2, 1, 1, 1),
        key_norms=one.key_norms.repeat(2, 1, 1),
        rest_mass=one.rest_mass.repeat(2, 1, 1),
        candidate_start=one.candidate_start,
    )
    selection = KlFusion(example.config).select(twice, example.budget)
    assert selection.positions.tolist() == [example.chosen, example.chosen]


def test_without_enough_heads_the_cross_head_step_is_the_identity() -> None:
    example = example_b()
    scores = KlFusion(example.config).scores(example.evidence)
    assert torch.equal(scores.final, scores.suppressed)
