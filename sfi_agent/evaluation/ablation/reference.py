"""The table of a grid's keys, for the documentation: from the models that read grids."""

from __future__ import annotations

import json

from pydantic import BaseModel

from sfi_agent.evaluation.ablation.grid import AblationGrid
from sfi_agent.evaluation.ablation.grid_sections import TaskEntry, TraceSettings
from sfi_agent.problems import describe_allowed, field_schema

__all__ = ["grid_reference"]

_HEAD = ("| key | allowed | default | meaning |", "|---|---|---|---|")
_IN_WORDS = {
    "tasks": "a list of tasks, see below",
    "base": "a preset's name or a mapping",
    "boundaries": "a mapping of names to lists of detectors, or a list of such lists",
    "selectors": "a list of names or entries",
    "settings": "a mapping of dotted keys to lists of values",
    "presets": "a list of names or mappings",
    "exclude": "a list of mappings",
    "traces": "a mapping, see below",
}
"""Keys whose forms are richer than their schema says."""


def grid_reference() -> str:
    """Tables of the keys of a grid, of its tasks and of its traces, as Markdown."""
    parts = [
        *_table(AblationGrid),
        "",
        "Keys of an entry of `tasks`:",
        "",
        *_table(TaskEntry),
        "",
        "Keys of `traces`:",
        "",
        *_table(TraceSettings),
    ]
    return "\n".join(parts)


def _table(model: type[BaseModel]) -> list[str]:
    return [*_HEAD, *(_row(model, name) for name in model.model_fields)]


def _row(model: type[BaseModel], name: str) -> str:
    fragment = field_schema(model, name)
    field = model.model_fields[name]
    allowed = _IN_WORDS.get(name) or describe_allowed(fragment)
    if field.is_required():
        default = "required"
    elif isinstance(field.default, BaseModel):
        default = "see below"
    else:
        default = f"`{_plain(fragment.get('default'))}`"
    meaning = " ".join(str(fragment.get("description", "")).split())
    cells = (f"`{name}`", allowed, default, meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
