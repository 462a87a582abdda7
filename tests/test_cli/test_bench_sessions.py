"""`sfi-agent bench sessions` on models small enough for tests."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sfi_agent.cli import bench_sessions_command
from sfi_agent.evaluation import random_models
from sfi_agent.evaluation.session_benchmark import needs
from tests.test_cli.conftest import Invoke
from tests.test_cli.stand_in import stand_in_engine

TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 2000,
    "tie_word_embeddings": True,
}
ARGUMENTS = (
    *("bench", "sessions", "--shape", "tiny", "--context", "900", "--answer-tokens", "100"),
    *("--rounds", "2", "--save-rounds", "2", "--turn-rounds", "2", "--device", "cpu"),
    *("--nested-forks", "2", "--more-tokens", "2", "--turn-tokens", "2"),
)
QUICK = (
    *("fork", "fork_policy", "fork_nested"),
    *("rewind_near", "rewind_far", "rewind_inside", "mark"),
)
DISK = ("save", "write", "save_again", "load_full", "load_sizes", "read")


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small shape, and an untrained model in place of the embedded one."""
    monkeypatch.setitem(random_models.MODEL_SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench_sessions_command, "load_engine", lambda *_, **__: stand_in_engine())


def test_the_tables(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(*ARGUMENTS, "--turn-context", "700", "--directory", str(tmp_path), columns=80)
    assert result.exit_code == 0, result.stderr
    assert "\u2026" not in result.stdout, "a table is too wide"
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    for arm in (*QUICK, *DISK):
        rows = [line for line in lines if line[0] == arm and line[2:3] in (["us"], ["ms"], ["s"])]
        assert len(rows) == 1, result.stdout
    words = " ".join(result.stdout.split())
    assert "tiny, bfloat16, a session of 900 tokens" in words and "1 thread, torch " in words
    assert "A fork reads the 900 tokens of its parent and allocated" in words
    assert "as fast as a plain write and fsync of the same bytes" in words
    assert "bit for bit" in words
    assert words.count("were new. Only new ones: met.") == 2
    assert "embedded, turn 2 behind a first prompt of 6" in words and "Not behind" not in words
    for stage in ("Building the model", "Saving, in turns", "Turn 2 of embedded"):
        assert stage in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_goes_to_stdout_and_to_the_file(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sfi-agent", "bench", "sessions", "--a b"])
    file = tmp_path / "sessions.json"
    result = invoke(
        *ARGUMENTS, "--arms", "mark, fork", "--preset", "exact", "--json", "--out", str(file),
        "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert json.loads(file.read_text()) == document
    assert document["shape"] == "tiny" and document["long"]["dtype"] == "float32"
    assert document["machine"]["device_name"] and document["machine"]["threads"] == 1
    assert shlex.split(document["command"]) == ["sfi-agent", "bench", "sessions", "--a b"]
    assert document["config"]["slow_step"] == "verify"
    assert set(document["times"]) == {"fork", "fork_policy", "fork_nested", "mark"}
    assert document["save"] is document["second_turn"] is document["disk"] is None
    assert set(document["targets"]) == {"fork", "fork_policy", "fork_nested"}
    assert all(isinstance(target["met"], bool) for target in document["targets"].values())


def test_a_model_that_takes_less_is_said(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = stand_in_engine()

    class Short:
        """A model that takes less than its configuration says at first sight."""

        def __getattr__(self, name: str) -> object:
            return getattr(engine, name)

        class shape:
            context_limit_tokens = 1800
            device = engine.shape.device

    monkeypatch.setattr(bench_sessions_command, "load_engine", lambda *_, **__: Short())
    result = invoke(*ARGUMENTS, "--arms", "turn")
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "Not behind 32,768 tokens: the model takes 1,800 tokens" in words
    assert "embedded, turn 2 behind a first prompt of 1,2" in words and "a session of" not in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "qwen9"], "got 'qwen9'; allowed: qwen3-0.6b"),
        (["--dtype", "auto"], "there is no checkpoint to take it from"),
        (["--device", "warp"], "got 'warp'; allowed: auto, cpu"),
        (["--arms", "fork,load"], "got 'load'; allowed: fork, rewind, mark, save, turn"),
        (["--context", "300"], "allowed: 419 tokens or more"),
        (["--turn-context", "16000"], "a first prompt of 16,000 tokens"),
        (["--model", "/no/such/model"], "read the configuration of '/no/such/model'"),
        (["--directory", "/no/such/folder"], "allowed: a folder that exists"),
        (["--out", "."], "a file in a folder that exists"),
        (["--preset", "nothing"], "no preset has this name"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str, invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, *arguments, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr


def test_what_does_not_fit_is_refused_before_it_is_built(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "free_bytes", lambda _: 10**9)
    result = invoke("bench", "sessions", "--device", "cpu")
    assert result.exit_code == 2 and result.stdout == ""
    said = " ".join(result.stderr.split())
    assert "weights 1.19 GB" in said and "a history of 100,272 tokens 11.50 GB" in said
    assert "1.0 GB, which are free in memory" in said and "lower --context" in said


def test_help_imports_no_torch(child_environment: Callable[..., dict[str, str]]) -> None:
    program = """
import atexit, sys
atexit.register(lambda: print(sorted({"torch", "transformers", "spacy"} & set(sys.modules))))
from sfi_agent.cli.main import app
app(prog_name="sfi-agent")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", "sessions", "--help"],
        capture_output=True,
        text=True,
        env={**child_environment(), "COLUMNS": "100"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
