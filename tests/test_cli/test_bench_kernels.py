"""`sfi-agent bench kernels`: the table and the document on a shape small enough for tests."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from sfi_agent.evaluation import kernel_benchmark
from tests.test_cli.conftest import Invoke

ARGUMENTS = (
    *("bench", "kernels", "--heads", "4", "--kv-heads", "2", "--head-size", "16"),
    *("--layers", "2", "--dtype", "float32", "--memory-tokens", "270", "--context", "300"),
    *("--hidden-size", "24", "--intermediate-size", "40", "--vocabulary", "50"),
    *("--batch", "1", "--batch", "2", "--queries", "2", "--device", "cpu", "--rounds", "2"),
)


@pytest.fixture
def reference_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stands in for the kernels, and the copy is small."""
    measure = partial(kernel_benchmark.benchmark_kernels, copy_bytes=1 << 20)
    monkeypatch.setattr(kernel_benchmark, "benchmark_kernels", measure)
    monkeypatch.setattr(kernel_benchmark, "refuse_without_kernels", lambda *_: None)


@pytest.mark.usefixtures("reference_allowed")
def test_the_table(invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS)
    assert result.exit_code == 0, result.stderr
    assert "4 heads on 2 KV heads of 16, float32, 2 layers, fast steps read 270" in result.stdout
    assert f"CPU, cpu, torch {torch.__version__}" in result.stdout
    assert "300 tokens x 1 sequence; a copy of 1.05 MB runs at" in result.stdout
    assert "300 tokens x 2 sequences;" in result.stdout
    assert "23 arms equal to the reference before timing." in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    # Keys and values of 270 tokens, the own token's twice, a query and an output.
    fast = [line for line in lines if line[0] == "fast"]
    assert len(fast) == 2 and "70.1 kB" in " ".join(fast[0]) and fast[0][-1] == "x"
    assert sum(line[:3] == ["gather", "all", "layers"] for line in lines) == 2
    assert "linear layers of 24 and 40 elements, 50 tokens in the vocabulary" in result.stdout
    # 64 + 2 x 32 lines of 24 numbers, for one row 24 numbers in and 128 out.
    qkv = next(line for line in lines if line[0] == "linear_qkv")
    assert "12.9 kB" in " ".join(qkv) and qkv[-1] == "x" and "left out" not in result.stdout
    assert "Compiling and checking kernels for 300 tokens x 2 ..." in result.stderr


@pytest.mark.usefixtures("reference_allowed")
def test_what_is_left_out_is_said(invoke: Invoke) -> None:
    batches = ARGUMENTS.index("--batch")
    only = (*ARGUMENTS[: batches + 2], *ARGUMENTS[batches + 4 :])
    result = invoke(*only, "--batch", "17")
    assert result.exit_code == 0, result.stderr
    said = "linear_... left out with 17 sequences: the kernels take up to 16 rows"
    assert said in " ".join(result.stdout.split())
    assert sum(line.split()[:1] == ["linear_head"] for line in result.stdout.splitlines()) == 1


@pytest.mark.usefixtures("reference_allowed")
def test_json_goes_to_stdout_and_to_the_file(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    result = invoke(*ARGUMENTS, "--json", "--out", str(file))
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert json.loads(file.read_text()) == document
    assert document["machine"]["kernels"] == "reference" and document["machine"]["python"]
    assert document["shape"]["block_queries"] == [2] and document["shape"]["sink_tokens"] == 4
    assert document["shape"]["linear"]["hidden_size"] == 24 and document["left_out"] == []
    assert {one["batch"] for one in document["timings"]} == {1, 2}
    assert all(one["rounds"] == 2 for one in document["timings"])


def test_without_a_device_there_is_no_table(invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert "got no CUDA device" in result.stderr and "bench decode" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "int8"], "got 'int8'; allowed: bfloat16, float16, float32"),
        (["--kv-heads", "3"], "4 heads with 3 KV heads"),
        (["--memory-tokens", "260"], "more than sink + recent = 260"),
        (["--context", "270"], "more than the memory of 270"),
        (["--queries", "2"], "each number once"),
        (["--device", "warp"], "got 'warp'; allowed: auto, cpu"),
        (["--hidden-size", "0"], "hidden size: 0"),
        (["--out", "."], "a file in a folder that exists"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: list[str], said: str, invoke: Invoke) -> None:
    result = invoke(*ARGUMENTS, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr
