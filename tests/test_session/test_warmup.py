"""`Engine.warmup` and the options of an engine's execution, as a CPU shows them."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import ConfigError, ContextOverflowError, Engine, InputError, SessionConfig
from sfi_agent.engine.compile_backend import step_backend
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.trace import SlowStepKind
from tests.families import CONTEXT_TOKENS, model_of, tiny_engine, word_tokenizer
from tests.test_engine.program_cases import POLICY, counted_requests, fresh_program_engine


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0},
        {"batch": -1},
        {"batch": True},
        {"batch": 1.0},
        {"context_tokens": -1},
        {"context_tokens": "8k"},
    ],
    ids=repr,
)
def test_numbers_of_a_warm_up_are_checked(options: Any) -> None:
    with pytest.raises(InputError, match="allowed: an integer of at least"):
        tiny_engine("llama").warmup(POLICY, **options)


def test_a_warm_up_for_more_than_the_model_takes_is_refused() -> None:
    with pytest.raises(ContextOverflowError) as caught:
        tiny_engine("llama").warmup(POLICY, context_tokens=CONTEXT_TOKENS + 1)
    assert caught.value.needed_tokens == CONTEXT_TOKENS + 1
    assert caught.value.limit_tokens == CONTEXT_TOKENS


def test_a_policy_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="dense_layers"):
        tiny_engine("llama").warmup(SessionConfig(memory={"dense_layers": [9]}))


@pytest.mark.parametrize("compiled", [True, False])
def test_on_a_cpu_there_is_nothing_to_prepare_and_the_report_says_so(compiled: bool) -> None:
    said: list[str] = []
    report = tiny_engine("llama").warmup(
        batch=3, context_tokens=100, compiled=compiled, on_progress=said.append
    )
    assert not report.compiled and not report.captured and not said
    assert "eager" in report.reason


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
def test_a_warm_up_takes_every_kind_of_step_that_a_session_takes(
    slow_step: SlowStepKind, batch: int
) -> None:
    """And leaves programs with room for the histories that were announced."""
    engine = fresh_program_engine("llama")
    config = POLICY.replace(slow_step=slow_step)
    with counted_requests() as counts:
        report = engine.warmup(config, batch=batch, context_tokens=400, compiled=False)
    assert not report.captured and not report.compiled and report.seconds > 0
    warmed = set(counts)
    with counted_requests() as counts, engine.session(config) as session:
        session.decode(list(range(40)), max_new_tokens=40)
    assert warmed >= set(counts) >= {"FastStep"}
    programs: Any = engine.runner.programs
    assert programs.least_capacity_tokens == 400


def test_a_warm_up_fits_segments_as_long_as_the_context() -> None:
    """Blocks have a largest size, however long segments may be."""
    engine = fresh_program_engine("llama")
    for slow_step in ("observe", "verify"):
        config = SessionConfig(slow_step=slow_step, refresh={"max_segment_tokens": CONTEXT_TOKENS})
        engine.warmup(config, compiled=False)


@pytest.mark.parametrize("execution", ["captured", "uncaptured", "", None])
def test_an_unknown_execution_is_refused(execution: Any) -> None:
    """ "uncaptured" is for tests, through a runner."""
    with pytest.raises(ConfigError, match="'auto' or 'eager'"):
        Engine(model_of("llama"), execution=execution)


def test_programs_run_where_they_are_wanted_and_numbers_are_not_checked() -> None:
    engine = tiny_engine("llama")
    assert Engine(model_of("llama"), word_tokenizer()).runner.programs is None
    assert Engine(model_of("llama"), execution="eager").runner.programs is None
    uncaptured = Runner(engine.model, engine.shape, execution="uncaptured")
    assert uncaptured.programs is not None and not uncaptured.programs.captures
    checking = Runner(engine.model, engine.shape, execution="uncaptured", check_numbers=True)
    assert checking.programs is None


def test_a_report_claims_no_capture_where_every_step_was_eager() -> None:
    """As on a device whose kernels lack the model's head size."""
    engine = tiny_engine("llama")
    programs = Runner(engine.model, engine.shape, execution="uncaptured").programs
    assert programs is not None
    programs._capture = True
    programs._backend = step_backend
    programs._say("head size 12 is not a multiple of 8 up to 256")
    assert not programs.captures and not programs.compiles
    assert "head size 12" in programs.reason
