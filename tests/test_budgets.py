"""Files and functions stay short enough to be read; tests are not counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.source_tree import PACKAGES, ROOT, modules

FILE_LINES, FILE_LINES_HARD = 300, 400
FUNCTION_LINES, FUNCTION_LINES_HARD = 40, 60


def sizes() -> Iterator[tuple[str, int, int, int]]:
    """Every file and function as (where, lines, budget, hard limit)."""
    for folder in (*PACKAGES.values(), ROOT / "examples"):
        for path, tree in modules(folder):
            where = path.relative_to(ROOT).as_posix()
            lines = len(path.read_text(encoding="utf-8").splitlines())
            yield where, lines, FILE_LINES, FILE_LINES_HARD
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    place = f"{where}:{node.lineno} {node.name}"
                    yield place, lines, FUNCTION_LINES, FUNCTION_LINES_HARD


def test_nothing_is_longer_than_its_hard_limit(capsys: pytest.CaptureFixture[str]) -> None:
    measured = list(sizes())
    assert len(measured) > 100
    over_budget = [
        f"{where}: {lines} lines, budget {budget}, hard limit {hard}"
        for where, lines, budget, hard in measured
        if lines > budget
    ]
    over_limit = [
        f"{where}: {lines} lines, hard limit {hard}"
        for where, lines, _, hard in measured
        if lines > hard
    ]
    if over_budget:
        with capsys.disabled():
            print("\nover budget:", *over_budget, sep="\n  ")
    assert over_limit == []
