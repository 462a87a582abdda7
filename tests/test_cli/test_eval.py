"""`sfi-agent eval`: the document, the screen, and what is refused before anything is computed."""

from __future__ import annotations

import json
import shutil
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from sfi_agent import SessionConfig
from sfi_agent.cli import eval_command, models
from sfi_agent.cli.eval_screen import EvalScreen
from sfi_agent.cli.main import app
from sfi_agent.evaluation.fidelity import PolicyFidelity, Window, measure_fidelity
from sfi_agent.presets import PRESETS
from tests.embedded_folder import shipped_or_stand_in
from tests.families import tiny_engine
from tests.test_cli.conftest import Invoke

PROMPT_TOKENS, CONTINUATION_TOKENS = 420, 40
SIZES = (
    *("--prompt-tokens", str(PROMPT_TOKENS)),
    *("--continuation-tokens", str(CONTINUATION_TOKENS)),
    *("--samples", "1", "--selected-tokens", "24"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_or_stand_in(tmp_path_factory.getbasetemp() / "embedded_stand_in")


@pytest.fixture(autouse=True)
def embedded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`embedded` is found also in a tree without the trained weights."""
    monkeypatch.setattr(models, "checkpoint_path", lambda: checkpoint)


def run_eval(checkpoint: Path, *arguments: str, columns: int = 100) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "checkpoint_path", lambda: checkpoint)
        variables = {"COLUMNS": str(columns), "NO_COLOR": None, "FORCE_COLOR": None}
        result = CliRunner().invoke(app, ["eval", "embedded", *SIZES, *arguments], env=variables)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def json_run(checkpoint: Path, folder: Path) -> Result:
    """A preset and a file, as JSON, also written to a file."""
    policy = SessionConfig.preset("fast", selector={"name": "window"}).save(folder / "mine.yaml")
    return run_eval(
        checkpoint,
        *("--preset", "fast", "--config", str(policy), "--probe-every", "2"),
        *("--json", "--out", str(folder / "eval.json")),
    )


@pytest.fixture(scope="module")
def document(json_run: Result) -> Any:
    return json.loads(json_run.stdout)


@pytest.fixture(scope="module")
def screen(checkpoint: Path) -> str:
    return run_eval(checkpoint, "--preset", "fast", "--preset", "faithful").stdout


def test_the_document(document: Any, json_run: Result, folder: Path) -> None:
    assert json.loads((folder / "eval.json").read_text()) == document
    assert set(document) == {"model", "source", "settings", "thresholds", "policies"}
    model = document["model"]
    assert model["name"] == "embedded" and model["class"] == "Qwen3ForCausalLM"
    assert model["dtype"] == "float32" and model["parameters"] > 0
    assert document["source"]["name"] == "generated office logs"
    (window,) = document["source"]["windows"]
    assert PROMPT_TOKENS * 0.8 < window["prompt_tokens"] < PROMPT_TOKENS * 1.5
    assert 0 < window["text_tokens"] <= CONTINUATION_TOKENS
    assert document["settings"]["probe_every_steps"] == 2
    assert document["thresholds"]["safe_agreement"] == 0.99
    assert list(document["policies"]) == ["mine", "fast"]


def test_a_policy_of_the_document(document: Any) -> None:
    model = document["model"]
    for policy in document["policies"].values():
        assert set(policy) == {"policy", "config", "forced", "layers", "free", "verdict"}
        assert policy["config"]["memory"]["selected_tokens"] == 24
        assert set(policy["forced"]) == {"text", "continuation"}
        for forced in policy["forced"].values():
            assert 0 <= forced["agreement"] <= 1 and 0 <= forced["slow_share"] < 1
            kl = forced["kl_nats"]
            assert 0 <= kl["p50"] <= kl["p99"] and 0 <= kl["mean"] <= kl["p99"]
            assert sum(group["tokens"] for group in forced["by_distance"]) == forced["tokens"]
            assert 0 <= forced["uncertainty"]["token_share"] <= 1
            acceptance = forced["acceptance"]
            assert 0 <= acceptance["kept_share"] <= acceptance["agreed_share"] <= 1
        assert [layer["layer"] for layer in policy["layers"]] == list(range(model["layers"]))
        for layer in policy["layers"]:
            assert 0 < layer["recall_p1"] <= layer["recall_mean"] <= 1
            assert 0 <= layer["output_error_mean"] <= layer["output_error_p99"]
            assert layer["steps"] > 0 and len(layer["head_recall"]) > 0
        free = policy["free"]
        assert 0 <= free["agreed_tokens"][0] <= free["dense_tokens"][0] <= CONTINUATION_TOKENS
        # One window of at most 40 tokens.
        assert policy["verdict"]["level"] == "undecided"


def test_a_window_without_selection_recalls_less(document: Any) -> None:
    def recall(name: str) -> float:
        layers = document["policies"][name]["layers"]
        return float(sum(layer["recall_mean"] for layer in layers))

    assert recall("mine") < recall("fast")


def test_progress_goes_to_stderr(json_run: Result) -> None:
    for said in ("Loading embedded", "Cutting text", "Measuring window 1 of 1"):
        assert said in json_run.stderr


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_screen(screen: str) -> None:
    said = words(screen)
    assert "embedded: Qwen3ForCausalLM" in said and "1 window of" in said
    assert "generated office logs" in said and "report over log" in said
    rows = [line.split() for line in screen.splitlines()]
    assert any(row[:2] == ["policy", "slow"] for row in rows)
    for name in ("fast", "faithful"):
        assert any(row[:1] == [name] and "%" in row for row in rows)
    assert sum(row[:1] == ["text"] and "%" in row for row in rows) == 2
    assert "Higher is better" in said and "Lower is better" in said
    assert "mean KL by tokens since the refresh: 0:" in said
    assert said.count("verdict Undecided") == 2 and "1. measure" in said
    assert said.count("worst layer") == 2
    assert all(len(line) <= 100 for line in screen.splitlines())


def test_dense_layers_have_their_own_mark(screen: str) -> None:
    strips = [line.split() for line in screen.splitlines() if "recall  layer 0" in line]
    assert [strip[3][:2] == "··" for strip in strips] == [False, True]
    assert all(set(strip[3]) <= set("▁▂▃▄▅▆▇█·") for strip in strips)


@pytest.fixture(scope="module")
def measured() -> list[PolicyFidelity]:
    return measure_fidelity(
        tiny_engine("llama"),
        [Window(tuple(range(60)), tuple(range(9)), "ids")],
        {"published": SessionConfig(memory={"selected_tokens": 5, "recent_tokens": 5})},
        continuation_tokens=9,
    )


def test_the_table_fits_80_columns(document: Any, measured: list[PolicyFidelity]) -> None:
    console = Console(file=StringIO(), width=80)
    EvalScreen(console, document, measured).show()
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    (header,) = [line for line in lines if "KL p99" in line]
    assert (
        header.split() == "policy slow sees top-1 KL KL p99 recall error as dense accepts".split()
    )
    (row,) = [line for line in lines if line.split()[:1] == ["published"] and "%" in line]
    assert "…" not in row and max(map(len, lines)) <= 80


def test_plain_marks_where_bars_cannot_be_shown(
    document: Any, measured: list[PolicyFidelity]
) -> None:
    raw = BytesIO()
    file = TextIOWrapper(raw, encoding="ascii", errors="strict")
    EvalScreen(Console(file=file, width=100), document, measured).show()
    file.flush()
    (strip,) = [line for line in raw.getvalue().decode().splitlines() if "layer 0 " in line[:20]]
    assert set(strip.split()[3]) <= set("12345678")


def test_every_preset_is_measured_unless_some_are_named(
    monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    seen: list[str] = []

    def stop(_engine: Any, _windows: Any, policies: Any, *_: Any) -> None:
        seen.extend(policies)
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_command, "_measure", stop)
    assert invoke("eval", "embedded", *SIZES).exit_code != 0
    assert seen == list(PRESETS)


def test_a_checkpoint_on_text_of_a_file_and_on_the_standard_library(
    checkpoint: Path, tmp_path: Path, invoke: Invoke
) -> None:
    file = tmp_path / "text.md"
    file.write_text("Some words, again and again.\n" * 200)
    common = (
        *("--preset", "fast", "--prompt-tokens", "300", "--continuation-tokens", "8"),
        *("--samples", "1", "--selected-tokens", "8", "--json"),
    )
    result = invoke("eval", str(checkpoint), "--text", str(file), *common)
    assert result.exit_code == 0, result.stderr
    source = json.loads(result.stdout)["source"]
    assert source["name"] == str(file) and source["seed"] is None
    assert source["windows"][0]["origin"] == "text.md, character 0"
    result = invoke("eval", str(checkpoint), "--seed", "5", *common)
    assert result.exit_code == 0, result.stderr
    source = json.loads(result.stdout)["source"]
    assert source["name"].startswith("standard library of Python 3.") and source["seed"] == 5
    assert source["windows"][0]["origin"].endswith(".py")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "web"], "got 'web'; allowed: stdlib, logs"),
        (["--source", "logs", "--text", "x.txt"], "--text x.txt and --source logs"),
        (["--preset", "nice"], "got 'nice'"),
        (["--preset", "fast", "--preset", "fast"], "'fast' twice"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--out", "no/such/folder/x.json"], "a file in a folder that exists"),
    ],
)
def test_wrong_options_are_named_before_the_model_is_loaded(
    arguments: list[str], said: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(eval_command, "load_engine", must_not_load)
    result = invoke("eval", "embedded", *arguments, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr and "Traceback" not in result.stderr


def test_text_that_does_not_serve_is_named(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.touch()
    result = invoke("eval", "embedded", *SIZES, "--text", str(file))
    assert result.exit_code == 2 and "an empty file" in result.stderr
    result = invoke("eval", "embedded", *SIZES, "--prompt-tokens", "90000", "--source", "stdlib")
    assert result.exit_code == 2 and "tokens in this model" in result.stderr


def test_a_checkpoint_without_a_tokenizer_is_named(
    checkpoint: Path, tmp_path: Path, invoke: Invoke
) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path / name)
    result = invoke("eval", str(tmp_path), *SIZES)
    assert result.exit_code == 2 and "without a tokenizer" in result.stderr
    assert "Traceback" not in result.stderr
