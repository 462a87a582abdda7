"""What a warm-up plays, on the programs of captured steps without capture."""

from __future__ import annotations

from typing import Any

import pytest

from sfi_agent import ContextOverflowError, InputError, SessionConfig
from sfi_agent.engine.kernels import select_ranked
from sfi_agent.engine.programs import refreshing
from sfi_agent.engine.runner import Runner
from sfi_agent.observe.trace import SlowStepKind
from tests.families import tiny_engine


@pytest.mark.parametrize("slow_step", ["observe", "rectify", "verify"])
def test_a_warm_up_selects_something(
    slow_step: SlowStepKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, counts = tiny_engine("llama"), list[int]()
    runner = Runner(engine.model, engine.shape, execution="uncaptured")
    monkeypatch.setattr(engine, "runner", runner)
    inner = select_ranked

    def noted(*arguments: Any, **keywords: Any) -> Any:
        positions, found = inner(*arguments, **keywords)
        counts.append(int(found.max()))
        return positions, found

    monkeypatch.setattr(refreshing, "select_ranked", noted)
    config = SessionConfig(slow_step=slow_step, refresh={"max_segment_tokens": 16})
    engine.warmup(config, batch=2)
    assert counts and min(counts) > 0


def test_a_warm_up_without_programs_says_why_and_checks_its_arguments() -> None:
    engine = tiny_engine("llama")
    report = engine.warmup(batch=2)
    assert not report.captured and not report.compiled and "eager" in report.reason
    with pytest.raises(InputError, match="batch"):
        engine.warmup(batch=0)
    with pytest.raises(ContextOverflowError):
        engine.warmup(context_tokens=engine.shape.context_limit_tokens + 1)
