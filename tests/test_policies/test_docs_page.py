"""docs/writing_a_detector.md: its code runs, and its table is the list of the built-ins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sfi_agent.protocols import DETECTOR_NEEDS
from tests.test_policies.test_plugin import registered

PAGE = (Path(__file__).parents[2] / "docs" / "writing_a_detector.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_page_has_code() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=["detector", "moments", "contract"])
def test_code_blocks_run_on_their_own(block: str) -> None:
    exec(compile(block, "docs/writing_a_detector.md", "exec"), {"__name__": "docs_block"})


def test_the_table_lists_every_detector_with_options_and_defaults() -> None:
    table = PAGE.split("## The built-in detectors")[1]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table, flags=re.MULTILINE)
    documented = {name: dict(re.findall(r"`(\w+)` ([\w.]+)", options)) for name, options in rows}
    assert documented == {
        name: {option: str(value) for option, value in config().model_dump().items()}
        for name, (config, _) in registered().items()
    }


def test_every_need_is_explained() -> None:
    rows = re.findall(r'^\| `"(\w+)"` \|', PAGE, flags=re.MULTILINE)
    assert set(rows) == DETECTOR_NEEDS
