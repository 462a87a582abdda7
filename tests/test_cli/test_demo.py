"""`sfi-agent demo`: what it plays, what it says about it, and that both say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from sfi_agent import CheckpointError, InputError, SessionConfig, StepRecord, Usage
from sfi_agent.cli import demo_command
from sfi_agent.cli.demo_play import compare, long_enough_conversation, play
from sfi_agent.cli.demo_records import Demo
from sfi_agent.cli.demo_report import demo_json
from sfi_agent.cli.demo_screen import DemoScreen
from sfi_agent.cli.main import app
from sfi_agent.cli.models import cpu_threads
from sfi_agent.embedded import checkpoint_path
from sfi_agent.session.stats import SessionStats
from tests.test_cli.conftest import Invoke
from tests.test_cli.stand_in import conversation_of, memorised, stand_in_engine, tokenizer

LOG_TOKENS = 600
SEED = 0
WRONG = 2
"""Number of the question that the stand-in answers wrongly."""
WRONG_ANSWER = "Nobody knows. Nobody at all."
MODEL = {
    "name": "stand-in",
    "parameters": 12345,
    "layers": 3,
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "policy": "preset faithful",
}


def run_demo(*arguments: str, **env: str) -> Result:
    engine = stand_in_engine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_command, "load_engine", lambda *_, **__: engine)
        with memorised(engine, conversation_of(SEED, LOG_TOKENS), {WRONG: WRONG_ANSWER}):
            given = ["demo", "--log-tokens", str(LOG_TOKENS), "--seed", str(SEED), *arguments]
            variables = {"COLUMNS": "100", "NO_COLOR": None, "FORCE_COLOR": None, **env}
            return CliRunner().invoke(app, given, env=variables, catch_exceptions=False)


@pytest.fixture(scope="module")
def screen() -> str:
    result = run_demo()
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(scope="module")
def result_of_json() -> Result:
    return run_demo("--json")


@pytest.fixture(scope="module")
def document(result_of_json: Result) -> Any:
    return json.loads(result_of_json.stdout)


@pytest.fixture(scope="module")
def demo() -> Demo:
    """One that was played; tests that change something take a copy."""
    engine, conversation = stand_in_engine(), conversation_of(SEED, LOG_TOKENS)
    played = Demo(
        conversation,
        LOG_TOKENS,
        SessionConfig.preset("faithful", sampling={"max_new_tokens": 256}),
    )
    with memorised(engine, conversation):
        play(engine, played, on_stage=ignore, on_token=ignore, on_turn=ignore)
    return played


def ignore(_: object) -> None:
    """For what nobody wants to be told."""


def show(demo: Demo, console: Console) -> None:
    screen, turns = DemoScreen(console, demo, MODEL), list(demo.turns)
    screen.opening()
    for number, turn in enumerate(turns):
        demo.turns = turns[: number + 1]
        screen.turn(turn)
    screen.closing()


def shown(demo: Demo, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, markup=False, highlight=False)
    show(demo, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_conversation_is_on_the_screen(screen: str) -> None:
    conversation, said = conversation_of(SEED, LOG_TOKENS), words(screen)
    assert conversation.opening in said
    assert f'open_log(day="{conversation.day}") → Office log of {conversation.day}:' in said
    for number, case in enumerate(conversation.turns):
        assert words(case.question) in said
        for use in case.calls:
            (value,) = [json.dumps(value) for value in list(use.arguments.values())[:1]]
            assert f"{use.name}({next(iter(use.arguments))}={value}" in said
            assert use.result in said
        if number == WRONG:
            assert "Nobody knows." in said
            assert words(f"wrong; expected: {case.expected}") in said
    assert "4 of 5 right" in said


def test_short_answers_stand_unbroken_with_their_marks_below(screen: str) -> None:
    conversation = conversation_of(SEED, LOG_TOKENS)
    lines = screen.splitlines()
    for answer in (f"The log of {conversation.day} is open.■", "Nobody knows. Nobody at all.■"):
        (index,) = [number for number, line in enumerate(lines) if answer in line]
        start = lines[index].index(answer)
        # The first mark is that of the prefill, or of the retry that answer_start asks for.
        assert lines[index + 1][start] in "Pa"
        assert set(lines[index + 1]) <= set("PSTEMea ")


def test_numbers_on_the_screen_are_those_of_the_json(screen: str, document: Any) -> None:
    said = words(screen)
    for turn in document["turns"]:
        for played in turn["slow_fast"]["assistant_turns"]:
            usage = played["usage"]
            kinds = [step["kind"] for step in played["steps"]]
            assert (
                f"prompt {usage['prompt_tokens']:,} = {usage['cached_tokens']:,} cached + "
                f"{usage['prefilled_tokens']:,} prefilled; "
                f"{usage['output_tokens']} tokens written: {kinds.count('fast')} fast, "
                f"{kinds.count('slow')} slow, "
                f"{kinds.count('retry')} retried"
            ) in said
    stats, totals = document["stats"], document["totals"]
    assert f"{stats['history_tokens']:,} tokens" in said
    assert f"{totals['memory_tokens']:,} tokens" in said
    assert f"slow share {100 * stats['slow_share']:.0f} %" in said
    tokens = totals["generated_tokens"]
    assert f"{totals['identical_tokens']} of {tokens} tokens are those of dense" in said


def test_every_reason_is_explained_with_its_number(screen: str, document: Any) -> None:
    steps = [
        step
        for turn in document["turns"]
        for played in turn["slow_fast"]["assistant_turns"]
        for step in played["steps"]
    ]
    said = words(screen)
    retries = [step for step in steps if step["kind"] == "retry"]
    prefills = [step for step in steps if step["reason"] == "prefill"]
    reasons = Counter(step["reason"] for step in retries)
    assert set(reasons) <= {"answer_start: first token", "entropy: above 0.05 nats"}
    assert reasons["answer_start: first token"] > 0
    for reason, number in reasons.items():
        assert f"{reason[0]} {number} {reason}; the fast step was run again" in said
    assert f"P {len(prefills)} first token of a turn" in said
    assert len(prefills) == 7  # five answers and two tool calls


def test_json_is_one_document_with_the_field_names_of_the_records(
    result_of_json: Result, document: Any
) -> None:
    assert result_of_json.exit_code == 0
    assert "Turn 5 of 5, dense" in result_of_json.stderr
    assert len(document["turns"]) == 5 and document["log_tokens"] >= LOG_TOKENS
    stats_names = {field.name for field in fields(SessionStats)}
    assert set(document["stats"]) == set(document["dense_stats"]) == stats_names
    for turn in document["turns"]:
        for session in (turn["slow_fast"], turn["dense"]):
            assert set(session["usage"]) == {field.name for field in fields(Usage)}
            for played in session["assistant_turns"]:
                for step in played["steps"]:
                    assert set(step) == {field.name for field in fields(StepRecord)} | {"text"}
    assert SessionConfig.model_validate(document["config"]).memory.selected_tokens == 512


def test_history_is_reused_and_only_new_tokens_are_prefilled(document: Any) -> None:
    turns = [turn for one in document["turns"] for turn in one["slow_fast"]["assistant_turns"]]
    assert turns[0]["usage"]["cached_tokens"] == 0
    assert turns[1]["usage"]["prefilled_tokens"] >= document["log_tokens"]
    for before, after in zip(turns, turns[1:], strict=False):
        sequence = before["usage"]["prompt_tokens"] + before["usage"]["output_tokens"]
        # The last token of a turn waits to be processed with the next message, and with it the
        # open segment of at most 64 tokens, whose keys and values rectify computes again.
        assert sequence - 1 - 64 <= after["usage"]["cached_tokens"] <= sequence - 1
        assert after["usage"]["reuse_lost_reason"] is None
    # The memory holds 4 sink, 512 selected and 256 recent tokens, and the open segment.
    assert 0 < document["totals"]["memory_tokens"] <= 4 + 512 + 256 + 64
    assert document["stats"]["memory_bytes"] < document["stats"]["history_bytes"]


def test_right_and_wrong_answers_are_told_apart(document: Any) -> None:
    correct = [turn["slow_fast"]["correct"] for turn in document["turns"]]
    assert correct == [True, True, True, False, True]
    assert document["turns"][WRONG + 1]["slow_fast"]["text"] == WRONG_ANSWER
    assert [turn["dense"]["correct"] for turn in document["turns"]] == correct


def test_the_dense_session_is_dense_and_plays_the_same(document: Any) -> None:
    kinds = {
        step["kind"]
        for turn in document["turns"]
        for played in turn["dense"]["assistant_turns"]
        for step in played["steps"]
    }
    assert kinds == {"slow"} and document["dense_stats"]["memory_bytes"] == 0
    for turn in document["turns"]:
        agreement = turn["agreement"]
        assert agreement["same_answer"]
        assert agreement["identical_tokens"] == agreement["dense_tokens"]


def test_colours_only_where_they_are_wanted(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def play_again(*given: Any) -> dict[str, Any]:
        (console,) = (item for item in given if isinstance(item, Console))
        show(demo, console)
        return {}

    monkeypatch.setattr(demo_command, "_play", play_again)
    coloured, plain = run_demo(FORCE_COLOR="1"), run_demo("--no-color", FORCE_COLOR="1")
    assert "\x1b[1;36mP" in coloured.stdout and "\x1b[1;33me" in coloured.stdout
    assert "36m" not in plain.stdout and "33m" not in plain.stdout and "P" in plain.stdout


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut_off(
    columns: int, demo: Demo
) -> None:
    lines = shown(demo, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert not any("…" in line for line in lines)
    heads = [line.split() for line in lines if line.startswith("turn ")]
    assert sum((line[1:] for line in heads), []) == (
        "tokens slow share slow-fast dense identical answers".split()
    )
    assert len(heads) == (2 if columns == 60 else 1)


def test_other_policies_can_be_shown(tmp_path: Path) -> None:
    file = SessionConfig(boundaries=({"name": "interval", "every_tokens": 5},)).save(
        tmp_path / "every_five.yaml"
    )
    said = words(run_demo("--config", str(file)).stdout)
    assert "I interval: 5 tokens" not in said  # times stand between mark and reason
    assert "interval: 5 tokens" in said and "every_five.yaml" in said.replace(" ", "")
    fast, name = demo_command._policy(None, "fast")
    assert (fast.selector.name, name) == ("question", "preset fast")


def test_threads_are_those_asked_for_and_given_back() -> None:
    with cpu_threads(2):
        # Outside the command two, inside it one: with more, tests would wait for busy cores.
        assert json.loads(run_demo("--json").stdout)["model"]["threads"] == 1
        assert torch.get_num_threads() == 2
        with cpu_threads(None):
            assert torch.get_num_threads() == 2
        with pytest.raises(InputError), cpu_threads(3):
            raise InputError("on the way")
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_disagreement_is_shown_with_what_dense_said(demo: Demo) -> None:
    demo = replace(demo, turns=list(demo.turns))
    turn = demo.turns[1]
    assert turn.agreement.complete and turn.slow_fast.correct
    first = turn.dense.assistant_turns[0]
    other = replace(
        first,
        tokens=(
            *first.tokens[:7],
            replace(first.tokens[7], record=replace(first.tokens[7].record, token_id=0)),
            *first.tokens[8:],
        ),
    )
    dense = replace(turn.dense, text="Something else.", correct=False, assistant_turns=(other,))
    agreement = compare(turn.slow_fast, dense)
    assert (agreement.identical_tokens, agreement.same_answer) == (7, False)
    assert not agreement.complete
    demo.turns[1] = replace(turn, dense=dense, agreement=agreement)
    said = words(shown(demo))
    assert f"identical for 7 of {agreement.slow_fast_tokens} tokens, another answer" in said
    assert "Something else." in said and "right, dense wrong" in said
    assert "4 of 5 answers are the same. Right: 5 slow-fast, 4 dense." in said


def test_a_tool_that_fails_and_a_call_that_cannot_be_read_are_shown(demo: Demo) -> None:
    demo = replace(demo, turns=list(demo.turns))
    turn = demo.turns[0]
    first, *rest = turn.slow_fast.assistant_turns
    ((call, result),) = first.calls
    bad = replace(result, content="open_log failed: no such day", is_error=True)
    unread = replace(call, name="", arguments={}, raw_text="{broken", error="not JSON")
    changed = replace(first, calls=((unread, bad),))
    demo.turns[0] = replace(
        turn, slow_fast=replace(turn.slow_fast, assistant_turns=(changed, *rest), correct=False)
    )
    said = words(shown(demo))
    assert "{broken() → open_log failed: no such day" in said
    assert "check wrong" in said and "wrong, dense right" in said
    json.dumps(demo_json(demo, MODEL))


def test_the_log_is_never_shorter_than_asked_for() -> None:
    def count(text: str) -> int:
        return len(tokenizer().encode(text, add_special_tokens=False))

    for seed in range(3):
        conversation, length = long_enough_conversation(seed, 900, count)
        assert length == count(conversation.log) >= 900
        assert length < 1100


def test_an_impossible_log_is_a_clean_error(invoke: Invoke, stand_in: Any) -> None:
    result = invoke("demo", "--log-tokens", "3", "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert "log_tokens 3" in result.stderr


def embedded_checkpoint() -> Path | None:
    try:
        return checkpoint_path()
    except CheckpointError:
        return None


@pytest.mark.skipif(embedded_checkpoint() is None, reason="the embedded checkpoint is not here")
def test_the_real_demo_in_a_process_of_its_own(
    child_environment: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    program = "from sfi_agent.cli.main import app; app(prog_name='sfi-agent')"
    environment = {**child_environment(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, "demo", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["log_tokens"] >= 4000
    totals, stats = document["totals"], document["stats"]
    assert totals["correct_answers"] >= 4 and totals["dense_correct_answers"] >= 4
    assert totals["same_answers"] >= 4
    assert 0 < stats["slow_share"] < 0.5
