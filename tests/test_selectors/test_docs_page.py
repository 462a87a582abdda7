"""docs/writing_a_selector.md: its code runs, and its table is the list of the built-ins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_selectors.matrix import registered

PAGE = (Path(__file__).parents[2] / "docs" / "writing_a_selector.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_page_has_code() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS, ids=["selector", "evidence", "contract", "ranking"])
def test_code_blocks_run_on_their_own(block: str) -> None:
    exec(compile(block, "docs/writing_a_selector.md", "exec"), {"__name__": "docs_block"})


def test_the_table_lists_every_selector_with_options_and_defaults() -> None:
    table = PAGE.split("## The built-in selectors")[1]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table, flags=re.MULTILINE)
    documented = {name: dict(re.findall(r"`(\w+)` ([\w.]+)", options)) for name, options in rows}
    assert documented == {
        name: {option: str(value) for option, value in config().model_dump().items()}
        for name, (config, _) in registered().items()
    }
