"""`sfi-agent bench decode` on a shape small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfi_agent.evaluation import random_models
from tests.test_cli.conftest import Invoke

TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
ARGUMENTS = ("bench", "decode", "--shape", "tiny", "--context", "700", "--rounds", "3")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_models.MODEL_SHAPES, "tiny", TINY)


def test_the_table(invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "tiny, float32, history of 700 tokens" in result.stdout
    assert "1 thread, torch " in result.stdout
    for arm in ("dense", "slow", "fast"):
        assert any(line.split()[:1] == [arm] for line in result.stdout.splitlines())
    assert "A fast step is" in result.stdout and "times their sum" in result.stdout


def test_json_goes_to_stdout_and_to_the_file(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    result = invoke(*ARGUMENTS, "--preset", "published", "--json", "--out", str(file))
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert json.loads(file.read_text()) == document
    assert document["shape"] == "tiny" and document["context_tokens"] == 700
    assert document["dtype"] == "bfloat16" and document["machine"]["threads"] == 1
    assert document["config"]["selector"]["name"] == "kl_fusion"
    assert set(document["arms"]) == {"dense", "slow", "fast"}
    for arm in document["arms"].values():
        low, high = arm["quartile_seconds"]
        assert arm["rounds"] == 3 and 0 < low <= arm["median_seconds"] <= high
    assert document["peak_over_needed"] > 0
    # 700 tokens, two layers, one head of 16, keys and values, two bytes each; in blocks.
    assert document["history_bytes"] >= 700 * 2 * 16 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "qwen9"], "got 'qwen9'; allowed: qwen3-0.6b"),
        (["--dtype", "int3"], "allowed: auto, float32, bfloat16, float16"),
        (["--dtype", "auto"], "there is no checkpoint to take it from"),
        (["--device", "warp"], "got 'warp'; allowed: auto, cpu"),
        (["--device", "meta"], "got 'meta'; allowed: auto, cpu"),
        (["--context", "100"], "more than sink + recent"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str, invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, *arguments, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr
