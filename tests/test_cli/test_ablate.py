"""`sfi-agent ablate`: what it prints, its exit status, and what it says when it cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sfi_agent.evaluation.ablation import player
from tests.test_cli.conftest import Invoke

GRID: dict[str, Any] = {
    "title": "Small",
    "model": "embedded",
    "tasks": [{"name": "office_attribute", "context_tokens": [500], "cases": 1}],
    "base": {"memory": {"recent_tokens": 16}},
    "selectors": ["per_head", "window"],
    "selected_tokens": [24, 48],
    "exclude": [{"selectors": "window", "selected_tokens": 48}],
    "traces": {"policies": 1},
}


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID))
    return path


def test_table_files_and_report(invoke: Invoke, grid_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    result = invoke("ablate", str(grid_file), "--out", str(out))
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "office_attribute, 500 tokens, dense_question" in lines[0]
    first = [line.split()[0] for line in lines if line.strip()]
    assert "dense" in first and first.count("per_head") == 2 and first.count("window") == 1
    assert "Skipped: window / 48: exclude rule 1" in result.stdout
    assert "4 of 4 runs finished." in result.stdout
    assert "loading embedded" in result.stderr and "4 of 4 runs" in result.stderr
    assert "left" not in result.stderr, "a bar was drawn where there is no terminal"
    for name in ("report.html", "results.csv", "results.json", "recall.json", "grid.yaml"):
        assert (out / name).stat().st_size > 0

    again = invoke("ablate", str(grid_file), "--out", str(out), "--json")
    assert again.exit_code == 0, again.stderr
    document = json.loads(again.stdout)
    assert document["report"] == str(out / "report.html") and document["folder"] == str(out)
    assert len(document["rows"]) == 4 and document["complete"] and document["title"] == "Small"
    assert document["command"] == f"sfi-agent ablate {grid_file} --out {out}"
    assert "4 of 4 runs" in again.stderr and "0 of 4 runs" not in again.stderr

    (out / "report.html").unlink()
    summed = invoke("ablate", "--report", str(out))
    assert summed.exit_code == 0 and "4 of 4 runs finished." in summed.stdout
    assert (out / "report.html").exists() and "loading" not in summed.stderr
    assert json.loads((out / "results.json").read_text())["command"] == document["command"]


def test_the_plan_is_said_without_playing(
    invoke: Invoke, grid_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(player, "load_engine")
    result = invoke("ablate", str(grid_file), "--plan")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "dense",
        "per_head / 24",
        "per_head / 48",
        "window / 24",
        "Skipped: window / 48: exclude rule 1 of the grid leaves it out",
        "Policies: 4, on 1 case: 4 runs.",
    ]
    document = json.loads(invoke("ablate", str(grid_file), "--plan", "--json").stdout)
    assert document["planned_runs"] == 4 and len(document["skipped"]) == 1
    assert document["policies"][2]["config"]["memory"]["selected_tokens"] == 48


def test_failed_runs_are_shown_and_change_the_exit_status(
    invoke: Invoke, grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = player.CasePlayer._make_case
    calls: list[Any] = []

    def broken(self: Any, key: Any) -> Any:
        calls.append(key)
        if len(calls) > 1:  # The first is the check before anything runs.
            raise RuntimeError("no such luck")
        return make(self, key)

    monkeypatch.setattr(player.CasePlayer, "_make_case", broken)
    out = tmp_path / "results"
    result = invoke("ablate", str(grid_file), "--out", str(out))
    assert result.exit_code == 1, result.stderr
    assert "Failed: per_head / 24, case 0: no such luck" in result.stdout
    assert "0 of 4 runs finished, 4 failed." in result.stdout
    assert (out / "report.html").exists()
    monkeypatch.undo()
    again = invoke("ablate", str(grid_file), "--out", str(out), "--retry-failed")
    assert again.exit_code == 0 and "4 of 4 runs finished." in again.stdout


def test_ctrl_c_says_how_to_go_on(
    invoke: Invoke, grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(player.CasePlayer, "play", interrupted)
    out = tmp_path / "results"
    result = invoke("ablate", str(grid_file), "--out", str(out))
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr and "Traceback" not in result.stderr
    document = json.loads((out / "results.json").read_text())
    assert not document["complete"] and document["finished_runs"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no grid"),
        (("grid.yaml",), "no --out"),
        (("missing.yaml", "--out", "out"), "missing.yaml"),
        (("grid.txt", "--out", "out"), ".yaml, .yml, .json"),
        (("grid.yaml", "--out", "out", "--report", "out"), "beside --report"),
        (("--report", "out", "--plan"), "--plan beside --report"),
        (("grid.yaml", "--out", "out", "--plan"), "--out beside --plan"),
        (("--report", "nowhere"), "no such folder"),
        (("grid.yaml", "--out", "taken"), "notes.txt"),
        (("wrong.yaml", "--out", "out"), "perhead"),
        (("grid.yaml", "--out", "out", "--workers", "0"), "workers"),
    ],
)
def test_wrong_uses_are_errors_with_a_sentence(
    invoke: Invoke,
    grid_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**GRID, "selectors": ["perhead"]}))
    (tmp_path / "grid.txt").write_text("{}")
    result = invoke("ablate", *arguments)
    assert result.exit_code == 2 and said in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
