"""The tables that `sfi-agent ablate` prints, from made-up rows."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sfi_agent.cli.ablate_tables import print_tables
from sfi_agent.evaluation.ablation.store import write_atomically
from tests.test_cli.conftest import Invoke
from tests.test_evaluation.report_folder import ReportFolder


def rows(stretches: int | None) -> list[dict[str, Any]]:
    folder = ReportFolder(stretches=stretches, lengths=(8192,), budgets=(128,))
    found: list[dict[str, Any]] = folder.results()["rows"]
    return [{"stretches": None, **row} for row in found]


def printed(found: list[dict[str, Any]], columns: int) -> list[str]:
    console = Console(file=io.StringIO(), width=columns)
    print_tables(console, found)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("stretches", [None, 1])
def test_short_answers_have_one_table(stretches: int | None) -> None:
    lines = printed(rows(stretches), 140)
    assert sum("office_report, 8,192 tokens" in line for line in lines) == 1
    assert not any("length against dense" in line for line in lines)


@pytest.mark.parametrize("columns", [50, 60, 80, 140])
def test_every_number_stands_beside_the_name_of_its_policy(columns: int) -> None:
    found = rows(None)
    found[1]["acceptance"] = 0.75
    lines = printed(found, columns)
    assert all(len(line) <= columns and "…" not in line for line in lines)
    heads = [line.split()[1:] for line in lines if line.split()[:1] == ["policy"]]
    assert " ".join(sum(heads, [])) == "right share 95 % slow accepted agrees per token"
    for row in found:
        # A long name is folded; its first line has the numbers.
        own = [line for line in lines if line.strip() and row["policy"].startswith(line.split()[0])]
        assert len(own) >= len(heads)
    accepted = [line for line in lines if " 0.75" in line]
    assert any(found[1]["policy"].startswith(line.split()[0]) for line in accepted)


@pytest.mark.parametrize(("columns", "tables"), [(140, 1), (60, 2)])
def test_long_answers_have_a_second_table_that_fits(columns: int, tables: int) -> None:
    found = rows(5)
    lines = printed(found, columns)
    start = next(index for index, line in enumerate(lines) if "length against dense" in line)
    along = lines[start + 1 :]
    assert all(len(line) <= columns and "…" not in line for line in along)
    heads = [line.split()[1:] for line in along if line.split()[:1] == ["policy"]]
    assert len(heads) == tables
    assert sum(heads, []) == ["0", "1,000", "2,000", "3,000", "4,000"]
    text = "\n".join(along)
    for row in found:
        for stretch in row["stretches"]:
            ratio = stretch["output_tokens"] / stretch["dense_output_tokens"]
            assert f"{stretch['right']}/{stretch['parts']} {ratio:.2f}" in text
    worst = min(found, key=lambda row: row["right"])
    assert worst["stretches"][-1]["right"] < 16, "or the cells are all alike"


def test_what_is_not_known_is_left_empty() -> None:
    found = copy.deepcopy(rows(2))
    found[1]["stretches"] = None
    found[2]["stretches"][0]["dense_output_tokens"] = None
    found[3]["stretches"][1]["dense_output_tokens"] = 0
    lines = printed(found, 140)
    start = next(index for index, line in enumerate(lines) if "length against dense" in line)
    cells = {
        row["policy"]: line.replace(row["policy"], "").split()
        for row in found
        for line in lines[start:]
        if line.strip().startswith(row["policy"])
    }
    assert cells[found[0]["policy"]] == ["16/16", "1.00", "16/16", "1.00"]
    assert cells[found[1]["policy"]] == []
    assert len(cells[found[2]["policy"]]) == len(cells[found[3]["policy"]]) == 3


def test_the_command_prints_and_draws_what_the_runs_hold(invoke: Invoke, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.yaml", tmp_path / "results"
    task = {"name": "office_attribute", "context_tokens": [500], "cases": 1}
    keys = {"tasks": [task], "selectors": ["window"], "traces": {"policies": 0}}
    grid.write_text(yaml.safe_dump(keys))
    short = invoke("ablate", str(grid), "--out", str(out))
    assert short.exit_code == 0, short.stderr
    assert "length against dense" not in short.stdout
    for path in (out / "runs").glob("*.json"):
        run = json.loads(path.read_text())
        (first,) = run["stretches"]
        sparse = run["policy"] != "dense"
        later = {"first_token": 1000, "right": 3 - sparse, "parts": 3, "output_tokens": 8 + sparse}
        write_atomically(path, {**run, "stretches": [first, later]})
    long = invoke("ablate", "--report", str(out))
    assert long.exit_code == 0, long.stderr
    along = long.stdout.split("length against dense")[1]
    assert "3/3 1.00" in along and "2/3 1.12" in along
    document = json.loads(invoke("ablate", "--report", str(out), "--json").stdout)
    ends = [row["stretches"][-1] for row in document["rows"]]
    assert [end["dense_output_tokens"] for end in ends] == [8, 8]
    assert ends[1]["share_low"] < 2 / 3 < ends[1]["share_high"]
    assert '"first_token":1000' in (out / "report.html").read_text(encoding="utf-8")
