"""`entropy` and `drift`, which judge fast steps."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sfi_agent import Boundary, InputError, StepEvent, TokenEvent
from sfi_policies import AnswerStart, AnswerStartConfig, Drift, DriftConfig, Entropy, EntropyConfig

entropies = st.floats(min_value=0.0, max_value=12.0, allow_nan=False)


def judge(detector: Entropy | Drift, values: list[float]) -> list[Boundary | None]:
    """What a detector says about fast steps with these values."""
    name = "entropy_nats" if isinstance(detector, Entropy) else "selected_mass"
    detector.reset([], "")
    fields: Any = ({name: value} for value in values)
    return [detector.after_step(StepEvent(n, **field)) for n, field in enumerate(fields)]


@given(threshold=st.floats(min_value=0.0, max_value=5.0), values=st.lists(entropies, max_size=20))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_entropy_above_the_threshold_is_reported(threshold: float, values: list[float]) -> None:
    detector = Entropy(EntropyConfig(threshold_nats=threshold))
    answers = judge(detector, values)
    assert [answer is not None for answer in answers] == [value > threshold for value in values]
    assert {answer.when for answer in answers if answer} <= {"now"}


def test_entropy_defaults_to_a_retry_above_three_tenths_of_a_nat() -> None:
    answers = judge(Entropy(EntropyConfig()), [0.3, 0.31])
    assert answers == [None, Boundary("entropy: above 0.3 nats", "now")]


def test_entropy_may_wait_for_the_next_step() -> None:
    answers = judge(Entropy(EntropyConfig(when="next")), [2.0])
    assert [answer and answer.when for answer in answers] == ["next"]


@given(values=st.lists(entropies, min_size=9, max_size=60), sigmas=st.floats(0.5, 4.0))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_spikes_are_measured_against_the_steps_before(values: list[float], sigmas: float) -> None:
    """The slow reference: mean and deviation of all earlier values, computed anew each time."""
    answers = judge(Entropy(EntropyConfig(threshold_sigmas=sigmas)), values)
    for index, (value, answer) in enumerate(zip(values, answers, strict=True)):
        if index < 8:
            assert answer is None
            continue
        before = values[:index]
        limit = statistics.fmean(before) + sigmas * max(statistics.pstdev(before), 0.01)
        if abs(value - limit) > 1e-6:
            assert (answer is not None) == (value > limit), index


def test_the_running_mean_follows_a_lasting_change() -> None:
    values = [0.1, 0.2] * 40 + [2.0, 2.2] * 150
    answers = judge(Entropy(EntropyConfig(threshold_sigmas=3.0)), values)
    reported = [index for index, answer in enumerate(answers) if answer is not None]
    assert reported[0] == 80, "the rise is a spike"
    assert reported[-1] < 100, "what lasts is none"


@pytest.mark.parametrize(
    ("options", "nats", "sigmas"),
    [
        ({}, 0.3, None),
        ({"threshold_nats": 0.02}, 0.02, None),
        ({"threshold_sigmas": 3.0}, None, 3.0),
        ({"threshold_nats": None, "threshold_sigmas": 2.5}, None, 2.5),
        ({"threshold_nats": 1.0, "threshold_sigmas": None}, 1.0, None),
    ],
)
def test_one_threshold_is_in_force_and_survives_a_round_trip(
    options: dict[str, Any], nats: float | None, sigmas: float | None
) -> None:
    config = EntropyConfig.model_validate(options)
    assert (config.threshold_nats, config.threshold_sigmas) == (nats, sigmas)
    assert EntropyConfig.model_validate(config.model_dump()) == config
    assert EntropyConfig.model_validate_json(config.model_dump_json()) == config
    assert EntropyConfig.model_validate_json(json.dumps(options)) == config


@pytest.mark.parametrize(
    "options",
    [
        {"threshold_nats": 0.3, "threshold_sigmas": 3.0},
        {"threshold_nats": None},
        {"threshold_nats": None, "threshold_sigmas": None},
    ],
)
def test_two_thresholds_or_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="threshold_nats and threshold_sigmas"):
        EntropyConfig.model_validate(options)


@pytest.mark.parametrize(
    "options",
    [{"threshold_nats": -0.1}, {"threshold_sigmas": 0.0}, {"when": "later"}, {"treshold": 1}],
)
def test_entropy_options_have_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EntropyConfig.model_validate(options)


def test_a_model_without_sparse_layers_does_not_drift() -> None:
    detector = Drift(DriftConfig())
    assert detector.after_step(StepEvent(3)) is None
    assert detector.after_step(StepEvent(4, selected_mass=0.0)) is not None


def test_an_event_without_what_is_needed_is_an_error() -> None:
    detector = Entropy(EntropyConfig())
    with pytest.raises(InputError, match="allowed: events that carry what `needs` names"):
        detector.after_step(StepEvent(3))
    assert detector.after_token(TokenEvent(1, 4)) is None


def test_drift_reports_a_fall_once_and_as_a_retry() -> None:
    detector = Drift(DriftConfig(minimum_mass=0.2))
    answers = judge(detector, [0.5, 0.2, 0.19, 0.1, 0.0, 0.3, 0.1])
    assert [index for index, answer in enumerate(answers) if answer] == [2, 6]
    assert {answer for answer in answers if answer} == {
        Boundary("drift: selected mass below 0.2", "now")
    }


def test_drift_reports_the_first_step_if_it_lacks_support() -> None:
    assert judge(Drift(DriftConfig()), [0.01])[0] is not None


def test_answer_start_reports_the_first_step_of_every_decoding() -> None:
    detector = AnswerStart(AnswerStartConfig())
    for _ in range(2):
        detector.reset([1, 2], "")
        before = detector.snapshot()
        assert detector.after_token(TokenEvent(1, 2)) is None
        boundary = detector.after_step(StepEvent(2))
        assert boundary == Boundary("answer_start: first token", "now")
        assert detector.after_step(StepEvent(3)) is None
        detector.restore(before)
        assert detector.after_step(StepEvent(2)) == boundary


@pytest.mark.parametrize("mass", [-0.1, 1.1])
def test_drift_options_have_ranges(mass: float) -> None:
    with pytest.raises(ValidationError):
        DriftConfig(minimum_mass=mass)
