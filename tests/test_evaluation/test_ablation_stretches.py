"""Long answers by stretch: what a run stores, what a row sums up, and folders without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfi_agent import SessionConfig
from sfi_agent.embedded.intervals import wilson_interval
from sfi_agent.evaluation.ablation import AblationGrid, run_ablation, write_ablation_report
from sfi_agent.evaluation.ablation.policy import Policy
from sfi_agent.evaluation.ablation.store import write_atomically
from sfi_agent.evaluation.ablation.stretches import STRETCH_TOKENS, row_stretches, run_stretches
from sfi_agent.evaluation.ablation.table import COLUMNS, table_rows
from sfi_agent.evaluation.ablation.units import CaseKey, RunKey
from sfi_agent.evaluation.play import CaseRun, TurnRun
from sfi_agent.evaluation.tasks import Case, task_named
from tests.test_evaluation.test_ablation_table import turn


def words(text: str) -> int:
    return len(text.split())


def key(policy: str, case: int = 0) -> RunKey:
    return RunKey(CaseKey("long_records", 4000, "dense_question", "own", 0, case), policy)


def stored(*stretches: tuple[int, int, int, int]) -> dict[str, Any]:
    """A finished run with (first token, right, parts, output tokens) per stretch."""
    names = ("first_token", "right", "parts", "output_tokens")
    return {
        "status": "done",
        "turns": [turn()],
        "stretches": [dict(zip(names, stretch, strict=True)) for stretch in stretches],
    }


FAILED: dict[str, Any] = {"status": "failed", "turns": [], "error": {"type": "X", "message": "y"}}
OLD: dict[str, Any] = {"status": "done", "turns": [turn()]}


def answered(case: Case, output: str) -> CaseRun:
    """A run that gave one answer."""
    score = task_named(case.task).score(case.turns[0], output)
    return CaseRun("small", (TurnRun(output, (), score, (), 0, 0, 0, 0.0, 0),))


# ---------------------------------------------------------------- one run


def test_a_run_keeps_what_is_right_of_every_thousand_tokens() -> None:
    case = task_named("long_records").make_case(context_tokens=6000, seed=7, count_tokens=words)
    references = case.turns[0].references
    whole = run_stretches(case, answered(case, "\n".join(references)), words)
    firsts = [stretch["first_token"] for stretch in whole]
    assert firsts == [STRETCH_TOKENS * index for index in range(len(whole))] and len(whole) >= 3
    assert sum(stretch["parts"] for stretch in whole) == len(references)
    assert all(stretch["right"] == stretch["parts"] for stretch in whole)
    assert whole[0]["output_tokens"] == words("\n".join(references))
    assert {stretch["output_tokens"] for stretch in whole[1:]} == {0}

    lost = whole[0]["parts"] + 3
    broken = run_stretches(case, answered(case, "\n".join(references[:lost])), words)
    assert [stretch["right"] for stretch in broken] == [lost - 3, 3] + [0] * (len(whole) - 2)
    assert [stretch["parts"] for stretch in broken] == [stretch["parts"] for stretch in whole]
    assert broken[0]["output_tokens"] < whole[0]["output_tokens"]


# ---------------------------------------------------------------- one row


def test_rows_sum_their_cases_beside_dense_on_the_same_cases() -> None:
    runs = {
        key("dense", 0): stored((0, 10, 10, 990), (1000, 9, 10, 500)),
        key("dense", 1): stored((0, 10, 10, 1010), (1000, 5, 5, 250)),
        key("dense", 2): stored((0, 10, 10, 7), (1000, 5, 5, 7)),
        key("small", 0): stored((0, 9, 10, 1000), (1000, 2, 10, 900)),
        key("small", 1): stored((0, 10, 10, 1040), (1000, 3, 5, 600)),
        key("small", 2): FAILED,
    }
    done = [(name, run) for name, run in runs.items() if name.policy == "small" and run != FAILED]
    found = row_stretches(done, runs)
    assert found is not None and [stretch["first_token"] for stretch in found] == [0, 1000]
    sums = [(stretch["right"], stretch["parts"], stretch["share"]) for stretch in found]
    assert sums == [(19, 20, 19 / 20), (5, 15, 5 / 15)]
    for stretch in found:
        interval = (stretch["share_low"], stretch["share_high"])
        assert interval == wilson_interval(stretch["right"], stretch["parts"])
        assert interval[0] < stretch["share"] < interval[1]
    lengths = [(stretch["output_tokens"], stretch["dense_output_tokens"]) for stretch in found]
    assert lengths == [(2040, 2000), (1500, 750)], "the case that failed counts on neither side"


def test_a_longer_case_adds_its_own_stretches() -> None:
    runs = {
        key("dense", 0): stored((0, 3, 3, 9), (1000, 2, 2, 8)),
        key("dense", 1): stored((0, 4, 4, 7)),
    }
    found = row_stretches(list(runs.items()), runs)
    assert found is not None
    assert [(s["first_token"], s["parts"], s["output_tokens"]) for s in found] == [
        (0, 7, 16),
        (1000, 2, 8),
    ]
    assert all(stretch["output_tokens"] == stretch["dense_output_tokens"] for stretch in found)


@pytest.mark.parametrize("dense", [None, FAILED, OLD])
def test_without_dense_on_the_same_case_its_length_is_unknown(dense: Any) -> None:
    runs = {key("small", 0): stored((0, 9, 10, 1000))}
    if dense is not None:
        runs[key("dense", 0)] = dense
    runs[key("dense", 1)] = stored((0, 10, 10, 1000))
    found = row_stretches([(key("small", 0), runs[key("small", 0)])], runs)
    assert found is not None and found[0]["right"] == 9
    assert found[0]["dense_output_tokens"] is None


def test_rows_with_a_run_of_an_earlier_version_have_no_sums() -> None:
    policies = [Policy("dense", SessionConfig(mode="dense")), Policy("small", SessionConfig())]
    runs = {
        key("dense", 0): stored((0, 10, 10, 900)),
        key("dense", 1): stored((0, 10, 10, 900)),
        key("small", 0): stored((0, 10, 10, 900)),
        key("small", 1): OLD,
    }
    dense, small = table_rows(policies, runs)
    assert dense["stretches"][0]["parts"] == 20 and small["stretches"] is None
    (alone,) = table_rows(policies, {key("small"): FAILED})
    assert alone["stretches"] is None
    assert "stretches" not in COLUMNS


# ---------------------------------------------------------------- folders


def test_stretches_are_stored_and_folders_without_them_stay_readable(tmp_path: Path) -> None:
    grid = AblationGrid(
        tasks=[{"name": "office_attribute", "context_tokens": [500], "cases": 2}],
        selectors=["window"],
        base={"memory": {"selected_tokens": 0, "recent_tokens": 16}},
        traces={"policies": 0},
    )
    results = run_ablation(grid, tmp_path / "new", report=False)
    assert results.document["stretch_tokens"] == STRETCH_TOKENS
    runs = [json.loads(path.read_text()) for path in (results.folder / "runs").glob("*.json")]
    for row in results.rows:
        mine = [run for run in runs if run["policy"] == row["policy"]]
        (stretch,) = row["stretches"]
        assert stretch["right"] == row["right"] and stretch["parts"] == row["parts"] == 2
        written = [run["stretches"][0]["output_tokens"] for run in mine]
        assert stretch["output_tokens"] == sum(written) > 0
    dense = next(row for row in results.rows if row["policy"] == "dense")["stretches"][0]
    assert {row["stretches"][0]["dense_output_tokens"] for row in results.rows} == {
        dense["output_tokens"]
    }

    for path in (results.folder / "runs").glob("*.json"):
        run = json.loads(path.read_text())
        if run["policy"] != "dense":
            del run["stretches"]
            write_atomically(path, run)
    again = write_ablation_report(results.folder)
    known = {row["policy"]: row["stretches"] is not None for row in again.rows}
    assert known == {"dense": True, "base": False} and again.complete
    assert again.document["notes"] == [] and again.report is not None
