"""`sfi-agent bench decode` on a shape small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sfi_agent.evaluation import random_models
from sfi_agent.evaluation.decode_benchmark import benchmark, clock
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
ARGUMENTS = (
    *("bench", "decode", "--shape", "tiny", "--context", "700", "--rounds", "3"),
    *("--segment", "4", "--device", "cpu"),
)
STEPS = ("generate", "dense", "slow", "fast", "observe", "rectify", "verify", "selection")


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, and a small buffer to copy."""
    monkeypatch.setitem(random_models.MODEL_SHAPES, "tiny", TINY)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 1 << 20})


def test_the_table(invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, "--dtype", "float32", columns=80)
    assert result.exit_code == 0, result.stderr
    assert "tiny, float32, history of 700 tokens, fast steps read 70" in result.stdout
    assert "1 thread, torch " in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    for arm in STEPS:
        assert any(line[0] == arm and line[-1] == "%" for line in lines), result.stdout
    assert "\u2026" not in result.stdout, "the table is too wide"
    assert "Medians of 3 samples" in result.stdout
    words = " ".join(result.stdout.split())
    assert "A fast step is" in words and "times their sum" in words
    assert "of the judged drafts stand" in words
    assert "a copy of 1.05 MB" in words and "Steps are eager" in words


def test_json_goes_to_stdout_and_to_the_file(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    result = invoke(*ARGUMENTS, "--preset", "published", "--json", "--out", str(file))
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert json.loads(file.read_text()) == document
    assert document["shape"] == "tiny" and document["context_tokens"] == 700
    assert document["dtype"] == "bfloat16" and document["machine"]["threads"] == 1
    for name in ("torch", "transformers", "python", "device_name"):
        assert document["machine"][name]
    assert document["command"].split()[0] == "sfi-agent"
    assert document["config"]["selector"]["name"] == "kl_fusion"
    assert tuple(document["arms"]) == STEPS and document["left_out"] == {}
    for arm in document["arms"].values():
        low, high = arm["quartile_seconds"]
        assert arm["rounds"] == 3 and 0 < low <= arm["median_seconds"] <= high
        assert arm["device_seconds"] is None
        assert arm["share_of_roof"] == arm["roof_seconds"] / arm["median_seconds"] > 0
    assert document["arms"]["dense"]["times_dense"] == 1.0
    assert document["warmup_seconds"] == document["warmup"]["seconds"] == 0.0
    assert not document["warmup"]["captured"] and "eager" in document["warmup"]["reason"]
    assert document["copy"]["bytes_per_second"] > 0
    # What is resident is read in pages, and such a small model may take pages that were there.
    assert document["peak_bytes"] > 0 and document["peak_over_needed"] >= 0
    # 700 tokens, two layers, one head of 16, keys and values, two bytes each; in blocks.
    assert document["history_bytes"] >= 700 * 2 * 16 * 2 * 2


def test_some_arms_of_a_batch_and_a_picture(invoke: Invoke, tmp_path: Path) -> None:
    picture = tmp_path / "times.svg"
    result = invoke(
        *ARGUMENTS, "--arms", "observe, dense", "--batch", "3", "--budget", "100", "--json",
        "--plot", str(picture), "--cycles", "2", "--acceptance", "0.5", "--no-compile",
        "--history-device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    # On a CPU that makes no difference.
    assert document["config"]["history"]["device"] == "cpu" and document["bus"] is None
    assert list(document["arms"]) == ["dense", "observe"] and document["batch"] == 3
    assert document["config"]["memory"]["selected_tokens"] == 100
    assert document["dense_over_fast"] is None and document["slow_over_dense"] is None
    assert 360 < document["memory_tokens"] < 366
    # Two segments of four fast tokens with their slow ones; sequences get out of step.
    assert 8 <= document["arms"]["observe"]["tokens"] <= 10
    svg = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    words = "".join(svg.itertext())
    assert "tiny, bfloat16, 700 tokens x 3 sequences" in words and "observe" in words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "qwen9"], "got 'qwen9'; allowed: qwen3-0.6b"),
        (["--dtype", "int3"], "allowed: auto, float32, bfloat16, float16"),
        (["--dtype", "auto"], "there is no checkpoint to take it from"),
        (["--device", "warp"], "got 'warp'; allowed: auto, cpu"),
        (["--device", "meta"], "got 'meta'; allowed: auto, cpu"),
        (["--context", "100"], "more than sink + recent"),
        (["--arms", "dense,sparse"], "got 'sparse'; allowed: generate, dense"),
        (["--arms", "kernels"], "`sfi-agent bench kernels` times them alone"),
        (["--arms", "dense,kernels"], "no CUDA device"),
        (["--history-device", "disk"], "'disk' is not one of 'same', 'cpu'"),
        (["--plot", "times.png"], "a file whose name ends in .svg"),
        (["--plot", "nowhere/times.svg"], "a file in a folder that exists"),
        (["--out", "."], "a file in a folder that exists"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str, invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, *arguments, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr


def test_what_does_not_fit_is_refused_before_it_is_built(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "free_bytes", lambda _: 10**9)
    result = invoke(*ARGUMENTS, "--shape", "qwen3-4b", "--context", "131072", "--batch", "4")
    assert result.exit_code == 2 and result.stdout == ""
    said = " ".join(result.stderr.split())
    assert "weights 8.04 GB" in said and "4 histories of 131,072 tokens 77." in said
    assert "4 memories of" in said and "1.0 GB, which are free" in said
    assert "--context, --batch or --budget" in said
