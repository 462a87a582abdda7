"""`sfi-agent chat`: streaming, commands, Ctrl-C, and JSON lines."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sfi_agent import SessionConfig, StepRecord, Usage
from sfi_agent.cli import chat_command
from sfi_agent.embedded import Conversation, make_conversation
from sfi_agent.session.stats import SessionStats
from tests.test_cli.conftest import Invoke
from tests.test_cli.stand_in import memorised

LOG_TOKENS = 300


@pytest.fixture
def office(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Conversation]:
    """A small office log that the stand-in knows all about."""
    monkeypatch.setattr(chat_command, "_LOG_TOKENS", LOG_TOKENS)
    conversation = make_conversation(0, log_tokens=LOG_TOKENS)
    with memorised(stand_in, conversation):
        yield conversation


def typed(*lines: str) -> str:
    return "\n".join([*lines, ""])


def test_answers_tools_and_the_end_of_the_input(invoke: Invoke, office: Conversation) -> None:
    first = office.turns[0]
    result = invoke("chat", "embedded", input=typed(office.opening, first.question))
    assert result.exit_code == 0, result.stderr
    assert f'[calls open_log {{"day": "{office.day}"}}]' in result.stdout
    assert f"[open_log says Office log of {office.day}:" in result.stdout
    assert f"The log of {office.day} is open.\n" in result.stdout
    assert first.expected in result.stdout
    assert "<|im_end|>" not in result.stdout


def test_steps_are_marked_when_asked_for(invoke: Invoke, office: Conversation) -> None:
    plain = invoke("chat", "embedded", input=typed(office.opening))
    marked = invoke(
        "chat", "embedded", "--show-steps", "--preset", "faithful", input=typed(office.opening)
    )
    assert "[P]" not in plain.stdout
    assert "[P]<tool_call>" in marked.stdout and "[e]" in marked.stdout
    assert " retried; " in marked.stdout and "0 cached + " in marked.stdout


def test_undo_takes_back_one_message_and_stats_follow(invoke: Invoke, office: Conversation) -> None:
    question = office.turns[0].question
    lines = [office.opening, "/stats", question, "/stats", "/undo", "/stats", question, "/undo"]
    result = invoke("chat", "embedded", input=typed(*lines, "/undo", "/undo", "/stats"))
    written = [
        int(line.rpartition("tokens ")[2].split()[0])
        for line in result.stdout.splitlines()
        if " written: " in line
    ]
    assert result.exit_code == 0, result.stderr
    before, after, undone, empty = written
    assert before == undone < after and empty == 0
    assert result.stdout.count(office.turns[0].expected) == 2
    assert "Back at 0 tokens." in result.stdout
    assert "There is nothing to undo." in result.stdout


def test_commands(invoke: Invoke, office: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    lines = ["/help", "/nope", "/save-config", f"/save-config {file}", "/save-config x.txt", " "]
    options = ("--max-new-tokens", "9", "--preset", "fast")
    result = invoke("chat", "embedded", *options, input=typed(*lines, "/quit", office.opening))
    assert result.exit_code == 0
    for command in ("/help", "/stats", "/undo", "/save-config", "/quit"):
        assert command in result.stdout
    assert "There is no command /nope." in result.stdout
    assert "Say where: /save-config policy.yaml" in result.stdout
    assert SessionConfig.load(file) == SessionConfig.preset("fast", sampling={"max_new_tokens": 9})
    assert "got the suffix '.txt'" in result.stderr
    assert "open_log says" not in result.stdout  # nothing is read behind /quit


def test_the_longest_answer_ends_with_a_note(invoke: Invoke, office: Conversation) -> None:
    result = invoke("chat", "embedded", "--max-new-tokens", "3", input=typed(office.opening))
    assert "(ended by the answer's token limit)" in result.stdout


def test_ctrl_c_ends_the_answer_and_keeps_the_session(
    invoke: Invoke, office: Conversation, stand_in: Any
) -> None:
    steps = 0

    def interrupt(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    handle = stand_in.model.register_forward_hook(interrupt)
    try:
        lines = (office.opening, "/undo", office.opening, "/stats")
        result = invoke("chat", "embedded", input=typed(*lines))
    finally:
        handle.remove()
    assert result.exit_code == 0, result.stderr
    assert "(cancelled; what was written stays)" in result.stdout
    assert result.stdout.count(f"The log of {office.day} is open.") == 1
    assert " written: " in result.stdout
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_chat(invoke: Invoke, office: Conversation, stand_in: Any) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    handle = stand_in.model.register_forward_hook(interrupt)
    try:
        result = invoke("chat", "embedded", input=typed(office.opening, "/stats"))
    finally:
        handle.remove()
    assert result.exit_code != 0 and " written: " not in result.stdout
    assert signal.getsignal(signal.SIGINT) is before
    # The model is given back all the same.
    assert stand_in.model.config._attn_implementation != "sfi_agent"


def test_json_lines(invoke: Invoke, office: Conversation) -> None:
    lines = typed(office.opening, "", office.turns[0].question)
    result = invoke("chat", "embedded", "--json", "--show-steps", input=lines)
    assert result.exit_code == 0, result.stderr
    first, second = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["reply"]["text"] == f"The log of {office.day} is open."
    assert second["reply"]["text"] == office.turns[0].expected
    assert second["reply"]["finish_reason"] == "stop"
    for turn in (first, second):
        assert set(turn) == {"reply", "usage", "stats"}
        assert set(turn["usage"]) == {field.name for field in fields(Usage)}
        assert set(turn["stats"]) == {field.name for field in fields(SessionStats)}
        names = {field.name for field in fields(StepRecord)}
        assert all(set(step) == names for step in turn["reply"]["steps"])
    usage = second["usage"]
    assert usage["cached_tokens"] + usage["prefilled_tokens"] == usage["prompt_tokens"]
    assert usage["cached_tokens"] > LOG_TOKENS / 2
    assert len(second["reply"]["steps"]) == usage["output_tokens"]


def test_a_message_that_fails_is_a_line_too_and_the_next_one_is_answered(
    invoke: Invoke, office: Conversation
) -> None:
    result = invoke("chat", "embedded", "--json", input=typed("word " * 20_000, office.opening))
    assert result.exit_code == 2
    failed, answered = [json.loads(line) for line in result.stdout.splitlines()]
    assert failed["error"]["type"] == "ContextOverflowError"
    assert failed["error"]["message"] in result.stderr
    assert answered["reply"]["text"] == f"The log of {office.day} is open."
    assert "steps" not in answered["reply"]
