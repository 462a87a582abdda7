"""The grids behind the numbers of the pages: they load, and the pages name each of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfi_agent.evaluation.ablation import AblationGrid
from sfi_agent.evaluation.ablation.plan import Plan
from tests.source_tree import ROOT

GRIDS = sorted([*(ROOT / "docs" / "studies").glob("*.yaml"), *ROOT.glob("examples/*grid.yaml")])


def test_there_are_grids() -> None:
    assert len(GRIDS) > 5


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: str(path.stem))
def test_a_grid_stands_for_runs_and_a_page_says_how_to_play_it(path: Path) -> None:
    plan = Plan.of(AblationGrid.load(path))
    assert len(plan.policies) > 1 and plan.runs
    command = f"sfi-agent ablate {path.relative_to(ROOT).as_posix()} --out "
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    assert any(command in page for page in pages), command
