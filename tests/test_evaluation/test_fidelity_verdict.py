"""Verdicts follow from the documented thresholds, and remedies from what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sfi_agent import SessionConfig
from sfi_agent.evaluation.fidelity import (
    Acceptance,
    DistanceFidelity,
    ForcedFidelity,
    FreeFidelity,
    LayerFidelity,
    Spread,
    Uncertainty,
    Verdict,
    judge,
)

CONFIG = SessionConfig(memory={"dense_layers": [3]})
FREE = FreeFidelity((50, 60), (60, 60), 55.0, 1, 0.1, None)
GOOD = ForcedFidelity(
    tokens=200,
    kl_nats=Spread(0.001, 0.0, 0.1),
    agreement=0.99,
    by_distance=(
        DistanceFidelity(0, 0, 20, 0.0, 1.0),
        DistanceFidelity(1, 1, 90, 0.01, 0.99),
        DistanceFidelity(8, 15, 90, 0.01, 0.99),
    ),
    acceptance=Acceptance(180, 170, 150),
    uncertainty=Uncertainty(0.3, 0.05, 0.4),
    slow_share=0.1,
    memory_share=0.3,
)


def layers(*recalls: float | None) -> tuple[LayerFidelity, ...]:
    return tuple(
        LayerFidelity(index, recall, recall, () if recall is None else (recall,), 0.1, 0.2, 9)
        for index, recall in enumerate(recalls)
    )


EVEN = layers(0.999, 0.999, 0.999, 0.999)


def verdict(
    found: tuple[LayerFidelity, ...] = EVEN, config: SessionConfig = CONFIG, **changes: Any
) -> Verdict:
    return judge(config, replace(GOOD, **changes), FREE, found)


def test_safe_at_the_thresholds() -> None:
    found = verdict()
    assert (found.level, found.remedies) == ("safe", ())
    assert "99 % of 200 tokens" in found.sentence and "0.1 at p99" in found.sentence
    assert "free output is dense's in 1 of 2 windows" in found.sentence


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"agreement": 0.9899}, "caution"),
        ({"kl_nats": Spread(0.001, 0.0, 0.101)}, "caution"),
        ({"agreement": 0.95, "kl_nats": Spread(0.05, 0.0, 2.0)}, "caution"),
        ({"agreement": 0.9499}, "unsafe"),
        ({"kl_nats": Spread(0.0501, 0.0, 2.0)}, "unsafe"),
        ({"tokens": 99}, "undecided"),
        ({"tokens": 100}, "safe"),
        ({"memory_share": None}, "undecided"),
        ({"memory_share": 0.91}, "undecided"),
        ({"memory_share": 0.9}, "safe"),
    ],
)
def test_levels(changes: dict[str, Any], level: str) -> None:
    found = verdict(**changes)
    assert found.level == level
    assert bool(found.remedies) == (level != "safe")


def test_agreement_is_rounded_down() -> None:
    assert "98.9 % of" in verdict(agreement=0.98999).sentence
    assert "100 % of" in verdict(agreement=1.0).sentence
    assert "99.9 % of" in verdict(agreement=0.99999).sentence


def test_a_few_bad_layers_are_to_be_kept_dense() -> None:
    found = verdict(layers(0.4, 0.99, 0.999, None, *[0.999] * 4), agreement=0.9)
    assert found.remedies[0] == "keep these layers dense: memory.dense_layers [0, 3]"


def test_loss_all_over_asks_for_a_larger_budget() -> None:
    found = verdict(layers(0.8, 0.8, 0.8, 0.8), agreement=0.9)
    assert found.remedies[0].startswith("raise memory.selected_tokens (now 2,048)")


def test_error_where_the_step_is_uncertain_asks_for_retries() -> None:
    found = verdict(agreement=0.9, uncertainty=Uncertainty(0.3, 0.052, 0.567))
    assert found.remedies[0] == (
        "retry uncertain steps: {name: entropy, threshold_nats: 0.3, when: now} among the "
        "boundaries; 5.2 % of the fast tokens are above it and hold 56 % of the KL"
    )
    assert not any("retry" in remedy for remedy in verdict(agreement=0.9).remedies)


def test_no_loss_asks_for_neither() -> None:
    found = verdict(agreement=0.9)
    assert not any("memory." in remedy for remedy in found.remedies)


def test_error_that_grows_with_the_distance_asks_for_more_refreshes() -> None:
    near, far = DistanceFidelity(1, 1, 90, 0.01, 0.99), DistanceFidelity(8, 15, 90, 0.04, 0.9)
    found = verdict(agreement=0.9, by_distance=(near, far))
    assert any("max_segment_tokens below 96" in remedy for remedy in found.remedies)
    calm = verdict(agreement=0.9, by_distance=(near, replace(far, kl_mean_nats=0.029)))
    assert not any("max_segment_tokens" in remedy for remedy in calm.remedies)


@pytest.mark.parametrize(("slow_step", "named"), [("observe", True), ("rectify", False)])
def test_rectify_is_a_remedy_for_observe_alone(slow_step: Any, named: bool) -> None:
    found = verdict(agreement=0.9, config=CONFIG.replace(slow_step=slow_step))
    assert any(remedy.startswith("slow_step rectify") for remedy in found.remedies) == named
    assert found.remedies[-1].startswith("slow_step verify (preset exact)")


def test_exact_is_said_of_what_was_identical() -> None:
    config = CONFIG.replace(slow_step="verify")
    same = replace(FREE, agreed_tokens=(60, 60), identical=2)
    found = judge(config, replace(GOOD, acceptance=None), same, EVEN)
    assert found.level == "exact" and "identical to dense in 2 of 2 windows" in found.sentence
    other = judge(config, replace(GOOD, agreement=0.97, acceptance=None), FREE, EVEN)
    assert other.level == "caution"
    assert len(other.remedies) == 1 and "float32" in other.remedies[0]


def test_dense_is_exact() -> None:
    found = verdict(config=SessionConfig(mode="dense"), memory_share=None)
    assert found.level == "exact" and found.remedies == ()
