"""The generated parts of the reference pages are up to date, and the generator notices when not."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from sfi_agent import BoundaryDetector, Selector, hookspecs
from sfi_agent.cli.reference import PAGES, main, regenerated
from sfi_agent.config import SessionConfig
from sfi_agent.plugins import PluginLoader
from sfi_agent.presets import PRESETS
from tests.source_tree import ROOT

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_up_to_date(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert regenerated(text) == text, "run `make docs`"


def test_every_key_option_plugin_and_preset_is_in_the_reference() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    registry = PluginLoader(load_entry_points=False).load()
    entries = [*registry.detectors.values(), *registry.selectors.values()]
    models: list[type[BaseModel]] = [SessionConfig, *(entry.config_model for entry in entries)]
    for name, field in SessionConfig.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            models.append(field.annotation)
            assert f"### {name}\n" in text
    for model in models:
        for name, field in model.model_fields.items():
            assert f"`{name}`" in text or f"### {name}\n" in text
            assert (field.description or "?") in text
    for entry in entries:
        assert f"### {entry.name}\n" in text
    for preset in PRESETS:
        assert f"| `{preset}` |" in text


def test_every_hook_and_method_is_documented_with_its_signature() -> None:
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    hooks: list[Callable[..., Any]] = [
        hookspecs.sfi_register_boundary_detectors,
        hookspecs.sfi_register_selectors,
    ]
    methods: list[Callable[..., Any]] = [
        member
        for protocol in (BoundaryDetector, Selector)
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and not name.startswith("_")
    ]
    assert len(methods) == 6
    for function in (*hooks, *methods):
        signature = str(inspect.signature(function)).replace("'", "")
        assert f"def {function.__name__}{signature}\n" in text


def test_an_outdated_page_is_found_and_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in PAGES:
        shutil.copy(DOCS / page, tmp_path / page)
    assert main(["--docs", str(tmp_path), "--check"]) == 0
    path = tmp_path / "configuration.md"
    path.write_text(path.read_text().replace("`sink_tokens`", "`sinks`"))
    before = path.read_text()
    assert main(["--docs", str(tmp_path), "--check"]) == 1
    assert "configuration.md is out of date" in capsys.readouterr().err
    assert path.read_text() == before
    assert main(["--docs", str(tmp_path)]) == 0
    assert path.read_text() == (DOCS / "configuration.md").read_text()


def test_prose_is_kept_and_unknown_blocks_are_refused() -> None:
    page = "# Mine\n\n<!-- generated: presets -->\nold\n<!-- end -->\n\nMore prose.\n"
    new = regenerated(page)
    assert new.startswith("# Mine\n") and new.endswith("More prose.\n") and "old" not in new
    with pytest.raises(KeyError, match="nothing_like_it"):
        regenerated("<!-- generated: nothing_like_it -->\n<!-- end -->\n")
