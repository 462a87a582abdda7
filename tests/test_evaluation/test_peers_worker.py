"""The worker script, in process: what it feeds, what it counts, and that dense is dense."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfi_agent import SessionConfig
from sfi_agent.evaluation.peers import worker
from sfi_agent.evaluation.peers.exchange import Arm, PeerTurn, PlannedCase, run_from_json
from sfi_agent.evaluation.peers.sessions import play_sessions
from tests.families import tiny_engine
from tests.test_evaluation.peers_cases import (
    STOP_ID,
    evicting_arm,
    fake_kvpress,
    plan_for,
    planned_case,
)

GENERATE = Arm("dense", "dense", "ours", "generate")
EXPLICIT = Arm("dense", "dense", "ours", "explicit")


@pytest.fixture(autouse=True)
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", fake_kvpress())


def played(case: PlannedCase, arm: Arm, kept_tokens: int = 20) -> tuple[PeerTurn, ...]:
    engine = tiny_engine("qwen3")
    (record,) = worker.play(engine.model, plan_for(case, arm, kept_tokens=kept_tokens))
    return run_from_json(record).turns


def dense_session(case: PlannedCase) -> tuple[PeerTurn, ...]:
    policies = {"dense": SessionConfig(mode="dense")}
    (run,) = play_sessions(tiny_engine("qwen3"), policies, [case])
    return run.turns


@pytest.mark.parametrize("protocol", ["dense_question", "sparse_question"])
@pytest.mark.parametrize("arm", [GENERATE, EXPLICIT], ids=["generate", "explicit"])
def test_dense_transformers_writes_what_a_dense_session_writes(arm: Arm, protocol: Any) -> None:
    case = planned_case(protocol, turns=3)
    theirs, ours = played(case, arm), dense_session(case)
    assert len(theirs) == len(ours) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.output_ids == other.output_ids
        assert len(mine.output_ids) > 1
        assert mine.prompt_tokens == other.prompt_tokens
        assert mine.new_prompt_tokens == other.new_prompt_tokens == other.fed_tokens
        assert other.fed_again_tokens == other.wrong_positions == 0
        assert mine.kept_tokens == other.kept_tokens
        assert mine.read_tokens == other.read_tokens


def test_an_answer_without_stop_id_is_closed_before_the_next_turn() -> None:
    case = planned_case(turns=2)
    first, second = played(case, GENERATE)
    assert STOP_ID not in first.output_ids
    grown = len(first.output_ids) + len(case.closing_ids) + len(case.turns[1].ids)
    assert second.prompt_tokens == first.prompt_tokens + grown


def test_an_answer_ends_with_its_stop_id_and_is_not_closed_twice() -> None:
    free = played(planned_case(turns=2), EXPLICIT)[0].output_ids
    stop = next(token for token in free if token not in free[:1])
    case = planned_case(turns=2)
    case = replace(case, stop_ids=(stop,))
    for arm in (GENERATE, EXPLICIT):
        first, second = played(case, arm)
        assert first.output_ids == free[: free.index(stop) + 1]
        grown = len(first.output_ids) + len(case.turns[1].ids)
        assert second.prompt_tokens == first.prompt_tokens + grown


def test_a_press_keeps_what_it_was_asked_for_and_positions_go_on() -> None:
    case = planned_case(turns=2)
    first, second = played(case, evicting_arm())
    assert first.fed_tokens == first.prompt_tokens == 59
    # 20 kept, and every token fed since: the last one of the answer is pending.
    assert first.kept_tokens == 20 + len(first.output_ids) - 1
    assert second.fed_tokens == second.new_prompt_tokens
    assert second.kept_tokens == first.kept_tokens + second.fed_tokens + len(second.output_ids) - 1
    assert first.wrong_positions == second.wrong_positions == 0
    assert first.output_ids[0] == dense_session(case)[0].output_ids[0]
    assert first.output_ids != dense_session(case)[0].output_ids


def test_the_question_comes_after_the_eviction_where_the_protocol_says_so() -> None:
    (turn,) = played(planned_case("sparse_question"), evicting_arm())
    assert turn.fed_tokens == 59
    assert turn.kept_tokens == 20 + 9 + len(turn.output_ids) - 1


def test_a_press_with_room_for_everything_is_dense() -> None:
    case = planned_case(turns=2)
    turns = played(case, evicting_arm(), kept_tokens=59)
    assert [turn.output_ids for turn in turns] == [turn.output_ids for turn in dense_session(case)]


def test_generate_feeds_an_evicted_context_again() -> None:
    first, second = played(planned_case(turns=2), evicting_arm(way="generate"))
    kept = 20 + len(first.output_ids) - 1
    assert first.kept_tokens == kept
    assert second.fed_tokens == second.prompt_tokens - kept
    assert second.fed_again_tokens == second.fed_tokens - second.new_prompt_tokens == 59 - 20


def test_a_decoding_press_evicts_between_steps_and_over_turns() -> None:
    first, second = played(planned_case(turns=2), evicting_arm("decoding"))
    # 11 steps after the prefill: the last of two evictions was three steps before the end.
    assert len(first.output_ids) == 12
    assert first.kept_tokens == 20 + 3
    assert second.kept_tokens < 30


def test_a_press_that_keeps_another_number_is_reported() -> None:
    turns = played(planned_case(turns=3), evicting_arm(press="WrongPress"))
    assert len(turns) == 1
    assert "kept [19, 19, 19, 19] tokens per layer, asked for 20" in turns[0].error


@pytest.mark.parametrize("way", ["explicit", "generate"])
def test_what_a_press_raises_is_a_result(way: str) -> None:
    (turn,) = played(planned_case(turns=2), evicting_arm(way=way, press="RaisingPress"))
    assert turn == PeerTurn(error="AssertionError: prompt too short")


def test_the_model_is_left_without_hooks() -> None:
    model: Any = tiny_engine("qwen3").model
    for arm in (GENERATE, evicting_arm(), evicting_arm(press="RaisingPress")):
        played(planned_case(), arm)
        assert not model.model._forward_hooks and not model.model._forward_pre_hooks


@settings(deadline=None)
@given(tokens=st.integers(1, 200_000), data=st.data())
def test_the_ratio_keeps_exactly_what_was_asked(tokens: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, tokens))
    ratio = worker.compression_ratio(tokens, kept)
    assert 0 <= ratio < 1
    assert int(tokens * (1 - ratio)) == kept


def test_feeds_count_what_is_fed_again_and_where() -> None:
    feeds = worker.Feeds(10, [14])
    feeds.note([6, 7, 8, 9, 10, 11, 12, 13], cached_tokens=3)  # 4 of them for the second time
    feeds.note([14], cached_tokens=11)
    feeds.note([12], cached_tokens=12)  # stands at 15
    assert (feeds.fed_tokens, feeds.fed_again_tokens, feeds.wrong_positions) == (8, 4, 1)
    assert feeds.read_tokens == 12 + 13


def test_versions_are_those_of_this_python() -> None:
    import torch
    import transformers

    found = worker.versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert set(found) == {"python", "torch", "transformers", "kvpress"}


@pytest.fixture
def saved_model(tmp_path: Path) -> Iterator[str]:
    tiny_engine("qwen3").model.save_pretrained(tmp_path / "model")
    yield str(tmp_path / "model")


def test_a_plan_file_becomes_a_results_file(
    saved_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = planned_case()
    plan = {**plan_for(case, GENERATE, evicting_arm()), "model": saved_model}
    plan_path, results_path = tmp_path / "plan.json", tmp_path / "results.jsonl"
    plan_path.write_text(json.dumps(plan))
    worker.main(["play", str(plan_path), str(results_path)])
    *records, last = map(json.loads, results_path.read_text().splitlines())
    assert last == {"done": True}
    runs = [run_from_json(record) for record in records]
    assert [run.arm for run in runs] == ["dense", "evicting"]
    assert runs[0].turns[0].output_ids == dense_session(case)[0].output_ids
    assert capsys.readouterr().out.splitlines() == [
        f"played dense {case.name}",
        f"played evicting {case.name}",
    ]
