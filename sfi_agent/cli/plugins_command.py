"""`sfi-agent plugins`: what configurations can name, where it came from, and what is broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from sfi_agent.cli.choices import Color, Json
from sfi_agent.cli.output import make_console, print_json
from sfi_agent.plugins import Owner, Registered, Registry, collect_plugin_errors
from sfi_agent.problems import describe_allowed, field_schema

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sfi_agent.errors import PluginError

__all__ = ["plugins"]

_BROKEN_STATUS = 1


def plugins(as_json: Json = False, color: Color = True) -> None:
    """List boundary detectors and selectors with their origin and options, and broken plugins.

    Exits with 1 when a plugin is broken; what works is listed all the same.
    """
    registry, errors = collect_plugin_errors()
    if as_json:
        print_json(_as_json(registry, errors))
    else:
        _print(make_console(color=color), registry, errors)
    if errors:
        raise typer.Exit(_BROKEN_STATUS)


def _as_json(registry: Registry, errors: Sequence[PluginError]) -> dict[str, Any]:
    return {
        "detectors": [_entry_json(entry) for entry in registry.detectors.values()],
        "selectors": [_entry_json(entry) for entry in registry.selectors.values()],
        "plugins": [_owner_json(owner) for owner in registry.owners],
        "blocked": list(registry.blocked),
        "broken": [
            {"plugin": error.plugin, "origin": error.distribution, "error": str(error)}
            for error in errors
        ],
    }


def _owner_json(owner: Owner) -> dict[str, str]:
    return {
        "plugin": owner.plugin,
        "origin": owner.origin,
        "distribution": owner.distribution,
        "version": owner.version,
        "value": owner.value,
    }


def _entry_json(entry: Registered) -> dict[str, Any]:
    return {"name": entry.name, **_owner_json(entry.owner), "options": _options(entry)}


def _options(entry: Registered) -> list[dict[str, Any]]:
    options = []
    for name in entry.config_model.model_fields:
        fragment = field_schema(entry.config_model, name)
        options.append(
            {
                "name": name,
                "default": fragment.get("default"),
                "allowed": describe_allowed(fragment),
                "unit": fragment.get("unit"),
                "description": fragment.get("description"),
            }
        )
    return options


def _print(console: Console, registry: Registry, errors: Sequence[PluginError]) -> None:
    from rich.text import Text

    kinds = (("Boundary detectors", registry.detectors), ("Selectors", registry.selectors))
    for title, entries in kinds:
        console.print(_table(title, list(entries.values())))
    if registry.blocked:
        console.print(f"Blocked on purpose: {', '.join(registry.blocked)}")
    for error in errors:
        console.print(Text.assemble(("Broken: ", "bold red"), str(error)), soft_wrap=True)


def _table(title: str, entries: Sequence[Registered]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("origin", overflow="fold")
    table.add_column("options with their defaults", overflow="fold")
    for entry in entries:
        options = Text()
        for option in _options(entry):
            value = option["default"]
            shown = value if isinstance(value, str) else json.dumps(value)
            options.append("  " if options else "")
            options.append(f"{option['name']}=", style="dim").append(shown)
        table.add_row(entry.name, entry.origin, options)
    return table
