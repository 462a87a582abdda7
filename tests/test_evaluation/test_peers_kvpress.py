"""The presses themselves, in their own environment.

Skipped unless the environment is named:
pytest -p tests.test_evaluation.peers_option --kvpress-python DIR/bin/python
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfi_agent.evaluation.peers.arms import WORKER_ARMS
from sfi_agent.evaluation.peers.environment import PINS, check_environment, run_worker
from sfi_agent.evaluation.peers.exchange import ArmRun, PlannedCase, plan_json
from tests.families import tiny_engine
from tests.test_evaluation.peers_cases import planned_case

pytestmark = pytest.mark.timeout(600)

PRESSES = [name for name, arm in WORKER_ARMS.items() if arm.press is not None]
KEPT_TOKENS = 130
"""More than SnapKV's window of 64 tokens."""


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    given: Any = pytestconfig.getoption("--kvpress-python", default=None)
    if given is None:
        pytest.skip("needs an environment with kvpress: --kvpress-python, see the module text")
    return Path(given)


@pytest.fixture(scope="module")
def cases() -> list[PlannedCase]:
    return [
        planned_case(protocol, turns=2, context_tokens=200, new_tokens=48)
        for protocol in ("dense_question", "sparse_question")
    ]


@pytest.fixture(scope="module")
def runs(
    python: Path, cases: list[PlannedCase], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], ArmRun]:
    folder = tmp_path_factory.mktemp("model")
    tiny_engine("qwen3").model.save_pretrained(folder)
    arms = list(WORKER_ARMS.values())
    plan = plan_json(arms, cases, model=str(folder), kept_tokens=KEPT_TOKENS)
    return {(run.arm, run.case): run for run in run_worker(python, plan)}


def test_the_environment_has_the_pins(python: Path) -> None:
    found = check_environment(python)
    assert found["kvpress"] == PINS["kvpress"]


def test_weights_and_dense_output_are_the_same_there(
    runs: dict[tuple[str, str], ArmRun], cases: list[PlannedCase]
) -> None:
    from sfi_agent import SessionConfig
    from sfi_agent.evaluation.peers.sessions import play_sessions

    for run in play_sessions(tiny_engine("qwen3"), {"d": SessionConfig(mode="dense")}, cases):
        theirs = runs["dense_peer", run.case]
        assert [turn.output_ids for turn in run.turns] == [turn.output_ids for turn in theirs.turns]


@pytest.mark.parametrize("name", PRESSES)
def test_presses_keep_what_they_are_asked_for(
    name: str, runs: dict[tuple[str, str], ArmRun], cases: list[PlannedCase]
) -> None:
    arm = WORKER_ARMS[name]
    for case in cases:
        if not arm.plays(case):
            continue
        first, second = runs[name, case.name].turns
        assert not first.error and not second.error
        assert first.wrong_positions == second.wrong_positions == 0
        question = len(case.turns[0].ids) if case.protocol == "sparse_question" else 0
        if arm.evicts == "prefill":
            assert first.kept_tokens == KEPT_TOKENS + question + len(first.output_ids) - 1
        else:
            assert KEPT_TOKENS <= first.kept_tokens < KEPT_TOKENS + 32
        # generate sees a cache that is shorter than the prompt and feeds the difference again.
        fed_again = second.fed_again_tokens
        assert fed_again > 0 if arm.way == "generate" else fed_again == 0
