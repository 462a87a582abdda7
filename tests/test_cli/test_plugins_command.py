"""`sfi-agent plugins`: everything that can be named, with origin and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfi_agent import load_plugins
from tests.distributions import installed, write_distribution
from tests.test_cli.conftest import Invoke

PLUGIN = """
from pydantic import Field
from sfi_agent import Settings, hookimpl

class Config(Settings):
    reach_tokens: int = Field(
        default=7, ge=1, description="How far.", json_schema_extra={"unit": "tokens"}
    )

@hookimpl
def sfi_register_selectors(register):
    register("remote", Config, lambda config: config)
"""


def test_the_list_is_the_registry(invoke: Invoke) -> None:
    result = invoke("plugins", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    document = json.loads(result.stdout)
    registry = load_plugins()
    for kind, entries in (("detectors", registry.detectors), ("selectors", registry.selectors)):
        listed = {entry["name"]: entry for entry in document[kind]}
        assert list(listed) == list(entries)
        for name, entry in entries.items():
            defaults = entry.config_model().model_dump(mode="json")
            shown = {item["name"]: item["default"] for item in listed[name]["options"]}
            assert shown == defaults
            assert listed[name]["origin"] == entry.origin
            assert all(item["description"] and item["allowed"] for item in listed[name]["options"])
    assert document["broken"] == []


@pytest.mark.parametrize("columns", [46, 60])
def test_a_narrow_terminal_shows_every_option_whole(columns: int, invoke: Invoke) -> None:
    told = invoke("plugins", columns=columns).stdout
    assert "…" not in told and max(map(len, told.splitlines())) <= columns
    for entry in load_plugins().selectors.values():
        for name in entry.config_model.model_fields:
            # A word that is too long for its column is folded.
            assert name[:8] in told


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_name_everything(columns: int, invoke: Invoke) -> None:
    result = invoke("plugins", columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    words = result.stdout.split()
    registry = load_plugins()
    for entry in (*registry.detectors.values(), *registry.selectors.values()):
        assert entry.name in words
        for name in entry.config_model.model_fields:
            assert any(word.startswith(f"{name}=") for word in words), name
    assert "built-in" in words and "threshold_nats=0.3" in words


def test_third_parties_are_listed_and_broken_ones_do_not_hide_them(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(tmp_path, "far-away", {"far_away": PLUGIN}, {"far": "far_away"}, "1.2")
    write_distribution(tmp_path, "sad-one", {}, {"sad": "no_such_module_at_all"}, "0.1")
    with installed(tmp_path, monkeypatch):
        text, data = invoke("plugins"), invoke("plugins", "--json")
    assert text.exit_code == data.exit_code == 1
    assert "far-away 1.2" in text.stdout and "reach_tokens=7" in text.stdout
    assert "Broken: plugin 'sad' (sad-one 0.1)" in text.stdout
    document = json.loads(data.stdout)
    (remote,) = [entry for entry in document["selectors"] if entry["name"] == "remote"]
    assert remote["distribution"] == "far-away" and remote["version"] == "1.2"
    assert remote["options"] == [
        {
            "name": "reach_tokens",
            "default": 7,
            "allowed": "integer >= 1 (tokens)",
            "unit": "tokens",
            "description": "How far.",
        }
    ]
    assert [item["plugin"] for item in document["broken"]] == ["sad"]
