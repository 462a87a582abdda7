"""The comparison as a whole: arms at one size, scores, tables, files and the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfi_agent import Engine, SessionConfig
from sfi_agent.embedded import checkpoint_path
from sfi_agent.errors import InputError
from sfi_agent.evaluation.peers import worker
from sfi_agent.evaluation.peers.__main__ import main
from sfi_agent.evaluation.peers.arms import (
    DENSE_ARM,
    WORKER_ARMS,
    arm_names,
    choose_arms,
    memory_tokens,
)
from sfi_agent.evaluation.peers.comparison import Comparison, compare
from sfi_agent.evaluation.peers.environment import PeerError
from sfi_agent.evaluation.peers.exchange import ArmRun, PeerTurn, plan_json, run_from_json
from sfi_agent.evaluation.peers.questions import Questions, peer_task
from sfi_agent.evaluation.peers.scores import score_runs, summarise
from sfi_agent.evaluation.peers.sessions import play_sessions, read_tokens
from sfi_agent.evaluation.peers.tables import comparison_tables
from sfi_agent.evaluation.tasks import Score
from sfi_agent.observe.trace import StepKind, StepRecord
from sfi_agent.presets import PRESETS
from tests.families import tiny_engine
from tests.test_evaluation.peers_cases import planned_case


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine.from_pretrained(checkpoint_path())


# ---------------------------------------------------------------- arms


def test_every_sparse_arm_is_held_to_one_size() -> None:
    contest = choose_arms(512)
    assert contest.kept_tokens == memory_tokens(512) == 772
    assert set(contest.policies) == {"dense_session", *PRESETS}
    for name in PRESETS:
        memory = contest.policies[name].memory
        assert memory.sink_tokens + memory.selected_tokens + memory.recent_tokens == 772
    plan = plan_json(contest.worker_arms, [], model="m", kept_tokens=contest.kept_tokens)
    assert {arm["kept_tokens"] for arm in plan["arms"]} == {772}
    assert tuple(contest.titles) == arm_names()
    assert contest.needs_kvpress


def test_chosen_arms_keep_their_order_and_dense_always_plays() -> None:
    contest = choose_arms(0, ["snapkv", "fast"])
    assert tuple(contest.titles) == (DENSE_ARM, "fast", "snapkv")
    assert [arm.name for arm in contest.worker_arms] == [DENSE_ARM, "snapkv"]
    assert not choose_arms(0, ["fast", "exact"]).needs_kvpress


def test_bad_arms_and_budgets_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"got arms \['snap'\]; allowed: dense_generate"):
        choose_arms(512, ["fast", "snap"])
    with pytest.raises(InputError, match="budget -1"):
        choose_arms(-1)


def test_presses_that_generate_play_conversations_with_the_question_in_the_prefill() -> None:
    single, several = planned_case(), planned_case(turns=2)
    apart = planned_case("sparse_question", turns=2)
    generate, explicit = WORKER_ARMS["knorm_generate"], WORKER_ARMS["knorm"]
    assert [generate.plays(case) for case in (single, several, apart)] == [False, True, False]
    assert all(explicit.plays(case) for case in (single, several, apart))
    assert all(WORKER_ARMS[DENSE_ARM].plays(case) for case in (single, several, apart))


# ---------------------------------------------------------------- sessions


@pytest.mark.parametrize("protocol", ["dense_question", "sparse_question"])
def test_a_policy_plays_as_a_session_of_its_own_would(protocol: str) -> None:
    engine = tiny_engine("qwen3")
    case = planned_case(protocol, turns=2)  # type: ignore[arg-type]
    config = SessionConfig(
        boundaries=[{"name": "interval", "every_tokens": 3}],
        memory={"sink_tokens": 1, "selected_tokens": 6, "recent_tokens": 3},
        refresh={"min_segment_tokens": 1, "max_segment_tokens": 4},
    )
    policies = {"dense": SessionConfig(mode="dense"), "sparse": config}
    dense, sparse = play_sessions(engine, policies, [case])
    stops = set(case.stop_ids)
    with engine.session(config) as session:
        session.decode(case.context_ids[:27], max_new_tokens=0)
        for index, turn in enumerate(case.turns):
            ids = list(case.context_ids[27:]) if index == 0 else []
            more = [*case.closing_ids] if index and session.token_ids[-1] not in stops else []
            given: list[int] = []
            if protocol == "dense_question":
                ids += [*more, *turn.ids]
            else:
                given = [*more, *turn.ids]
            before = len(session.trace)
            output = session.decode(
                ids, given_ids=given, max_new_tokens=turn.max_new_tokens, stop_ids=stops
            )
            question_steps = session.trace[before : before + len(given)]
            assert {step.kind for step in question_steps} == ({"slow", "fast"} if given else set())
            assert sparse.turns[index].output_ids == tuple(output)
    assert 0 < (sparse.turns[0].dense_passes or 0) < (dense.turns[0].dense_passes or 0)
    assert 0 < sparse.turns[0].read_tokens < dense.turns[0].read_tokens
    assert sparse.turns[1].kept_tokens == sparse.turns[1].prompt_tokens + 11
    assert sparse.turns[1].fed_again_tokens == 0


def test_tokens_read_count_every_step_that_was_run() -> None:
    def step(kind: StepKind, position: int, **counts: int) -> StepRecord:
        return StepRecord(kind, None, "", 10, 0, 0.0, position, 0, **counts)

    def read(steps: list[StepRecord], windows: tuple[int | None, ...], dense: list[int]) -> float:
        shape = SimpleNamespace(windows=windows)
        config = SessionConfig(memory={"dense_layers": dense})
        session: Any = SimpleNamespace(engine=SimpleNamespace(shape=shape), config=config)
        return read_tokens(session, steps)

    prefill, fast = step("slow", 100), step("fast", 101)
    slow, retry = step("slow", 102, dense_passes=1), step("retry", 103, dense_passes=1)
    assert read([prefill], (None,), []) == 0
    assert read([prefill, fast, slow, retry], (None,), []) == 10 + 102 + (10 + 103)
    assert read([fast, slow], (None, None), [1]) == (10 + 102 + 101 + 102) / 2
    assert read([fast, slow], (None, 7), []) == (10 + 102 + 7 + 7) / 2
    verified = step("slow", 104, dense_passes=1, drafted_tokens=5, accepted_tokens=2)
    assert read([fast, fast, verified], (None,), []) == 2 * 10 + 104 + 3 * 10


# ---------------------------------------------------------------- scores and tables


def run(arm: str, case: str, *turns: PeerTurn) -> ArmRun:
    return ArmRun(arm, case, turns)


def judge(name: str, index: int, text: str) -> Score:
    """Two parts: the letters a and b."""
    right = ("a" in text) + ("b" in text)
    return Score(right, 2, text == "ab")


def decode(ids: object) -> str:
    assert isinstance(ids, tuple)
    return "".join(map(chr, ids))


def turn(text: str, **fields: float) -> PeerTurn:
    return replace(PeerTurn(output_ids=tuple(map(ord, text))), **fields)  # type: ignore[arg-type]


def test_turns_are_judged_and_summed() -> None:
    cases = [planned_case(turns=2, seed=seed) for seed in (0, 1)]
    first, second = (case.name for case in cases)
    runs = [
        run("dense", first, turn("ab"), turn("ab")),
        run("dense", second, turn("ab"), turn("ab")),
        run("press", first, turn("ac", dense_passes=1, read_tokens=6.0), turn("ab")),
        run("press", second, turn("ab"), PeerTurn(error="ValueError: short")),
    ]
    scored = score_runs(runs, cases, judge, decode, "dense")
    summaries = {(item.arm, item.turn): item for item in summarise(scored)}
    whole, last = summaries["press", 0], summaries["press", 2]
    assert (whole.answers, whole.answers_right) == (4, 2)
    assert (whole.parts, whole.parts_right) == (8, 5)
    assert (whole.agreed_tokens, whole.dense_tokens) == (5, 8)
    assert whole.same_as_dense == 2
    assert whole.slow_share == 1 / 6 and whole.read_per_token == 1.0
    assert whole.errors == last.errors == {"ValueError: short": 1}
    assert (last.answers, last.answers_right) == (2, 1)
    assert summaries["dense", 0].same_as_dense == 4
    assert summaries["dense", 0].slow_share is None and whole.acceptance is None


def test_a_conversation_that_broke_off_has_its_later_turns_wrong() -> None:
    case = planned_case(turns=3)
    runs = [
        run("dense", case.name, *(turn("ab"),) * 3),
        run("press", case.name, PeerTurn(error="AssertionError: window")),
    ]
    summaries = summarise(score_runs(runs, [case], judge, decode, "dense"))
    whole = next(item for item in summaries if (item.arm, item.turn) == ("press", 0))
    assert (whole.answers, whole.answers_right, whole.parts_right) == (3, 0, 0)
    assert whole.errors == {"AssertionError: window": 1, "not reached": 2}
    text = comparison_tables(summaries, {"dense": "dense", "press": "a press"})
    assert "- a press: 1 turns raised `AssertionError: window`" in text


def test_the_tables_say_what_the_sums_say() -> None:
    case = planned_case(turns=2)
    played = turn("ab", kept_tokens=7.0, dense_passes=1, drafted_tokens=4, accepted_tokens=3)
    runs = [run("dense", case.name, played, played)]
    summaries = summarise(score_runs(runs, [case], judge, decode, "dense"))
    text = comparison_tables(summaries, {"dense": "Dense", "absent": "Absent"})
    assert "### task, question in the dense prefill" in text
    assert "1 conversations of 2 turns" in text
    assert "| Dense | 1.000 (0.510 to 1.000) | 1.000 (0.342 to 1.000) | 2 of 2 " in text
    assert "0.500 (0.75 accepted)" in text and "Absent" not in text
    assert "| arm | turn 1 | turn 2 |" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| Dense")]
    assert [len(row) for row in rows] == [9, 3, 6]  # all turns, turn by turn, feeds


def test_a_run_survives_json() -> None:
    record = {"arm": "a", "case": "c", "turns": [{"output_ids": [1, 2], "kept_tokens": 2.5}]}
    assert run_from_json(record) == run("a", "c", PeerTurn(output_ids=(1, 2), kept_tokens=2.5))
    assert run_from_json({**record, "turns": [{"error": "E"}]}).turns == (PeerTurn(error="E"),)
    with pytest.raises(TypeError):
        run_from_json({**record, "turns": [{"tokens": 3}]})


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def comparison(embedded: Engine) -> Comparison:
    """One case under both protocols; the worker plays in this process, which is quicker."""

    def in_process(python: Path, plan: dict[str, Any], progress: object) -> list[ArmRun]:
        assert python == Path(sys.executable)
        assert plan["model"] == str(checkpoint_path()) and plan["dtype"] == "float32"
        written = json.dumps(list(worker.play(embedded.model, json.loads(json.dumps(plan)))))
        return [run_from_json(record) for record in json.loads(written)]

    questions = Questions((peer_task("office_report_easy"),), context_tokens=800, cases=1)
    contest = choose_arms(60, ["dense_session", "fast", "exact"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfi_agent.evaluation.peers.comparison.run_worker", in_process)
        return compare(embedded, checkpoint_path(), contest, questions)


def test_one_run_of_dense_arms_and_presets(comparison: Comparison) -> None:
    found = {(item.arm, item.protocol): item for item in comparison.summaries}
    for protocol in ("dense_question", "sparse_question"):
        for arm in (DENSE_ARM, "dense_session", "exact"):
            assert found[arm, protocol].same_as_dense == 1
            assert found[arm, protocol].answers_right == 1
        dense = found["dense_session", protocol].read_per_token
        assert found["fast", protocol].read_per_token < 0.9 * dense
        assert found[DENSE_ARM, protocol].read_per_token == dense
        share = found["fast", protocol].slow_share
        assert share is not None and 0 < share < 0.2
    assert comparison.details["versions"]["ours"]["transformers"]


def test_it_is_saved_as_json_and_tables(comparison: Comparison, tmp_path: Path) -> None:
    data, tables = comparison.save(tmp_path / "new" / "peers.json")
    saved = json.loads(data.read_text())
    assert saved["kept_tokens"] == 320
    assert len(saved["turns"]) == 8 and len(saved["prompts"]) == 2
    one, other = saved["prompts"]
    assert one["question_tokens"] == other["question_tokens"]
    assert one["sha256"] != other["sha256"]  # the protocol differs
    assert len(saved["weights"]) == 64
    assert tables.read_text() == comparison.markdown()
    assert "sfi-agent exact" in tables.read_text()


def test_an_earlier_comparison_spares_the_workers(
    comparison: Comparison, embedded: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = comparison.save(tmp_path / "earlier.json")
    saved = json.loads(data.read_text())

    def again(budget: int = 60, seed: int = 300_000) -> Comparison:
        questions = Questions(
            (peer_task("office_report_easy"),), 800, 1, ("dense_question",), first_seed=seed
        )
        contest = choose_arms(budget, ["fast"])
        return compare(embedded, checkpoint_path(), contest, questions, earlier_path=data)

    monkeypatch.setattr("sfi_agent.evaluation.peers.comparison.run_worker", None)
    second = again()
    assert [(turn.arm, turn.same_as_dense) for turn in second.turns] == [
        (DENSE_ARM, True),
        ("fast", True),
    ]
    assert second.turns[0] == comparison.turns[0]
    with pytest.raises(InputError, match="with other kept_tokens"):
        again(budget=61)
    with pytest.raises(InputError, match="with other case office_report_easy/dense_question/7"):
        again(seed=7)
    data.write_text(json.dumps({**saved, "weights": "other"}))
    with pytest.raises(InputError, match="with other weights"):
        again()
    data.write_text(json.dumps({**saved, "versions": {"ours": {"torch": "1.0"}}}))
    with pytest.raises(InputError, match="versions in the environment 'ours'"):
        again()
    data.write_text("[]")
    with pytest.raises(InputError, match="a JSON file that an earlier comparison wrote"):
        again()


def test_dense_must_not_fail(embedded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(python: Path, plan: dict[str, Any], progress: object) -> list[ArmRun]:
        return [run(DENSE_ARM, plan["cases"][0]["name"], PeerTurn(error="MemoryError: too long"))]

    monkeypatch.setattr("sfi_agent.evaluation.peers.comparison.run_worker", failing)
    questions = Questions((peer_task("office_report_easy"),), 800, 1, ("dense_question",))
    with pytest.raises(PeerError, match="dense transformers on office_report_easy.*MemoryError"):
        compare(embedded, checkpoint_path(), choose_arms(60, ["fast"]), questions)


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--arms", "fast", "knorm"], "--make-environment DIR"),
        (["--arms", "nobody"], "nobody"),
        (["--arms", "fast", "--tasks", "no_task"], "no_task"),
        (["--arms", "fast", "--budget", "-5"], "budget -5"),
        (["--arms", "fast", "--cases", "0"], "0 cases"),
        (["--arms", "fast", "--context-tokens", "20"], "context_tokens"),
        (["--arms", "fast", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
