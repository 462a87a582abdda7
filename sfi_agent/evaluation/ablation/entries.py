"""How the entries of a grid are read: short forms, boundary sets, policies given as mappings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sfi_agent.config import SessionConfig
from sfi_agent.config_model import merge_deeply
from sfi_agent.errors import ConfigError
from sfi_agent.plugin_options import BoundaryEntry, PluginEntry
from sfi_agent.problems import Problem, problems_error, problems_of, show_value

__all__ = [
    "AXIS_OF_KEY",
    "BoundarySet",
    "PolicyMapping",
    "as_boundary_sets",
    "as_policy",
    "as_selectors",
    "check_base",
    "check_preset",
    "check_settings",
    "entry_label",
    "nested",
    "policy_config",
    "problems_with",
]

PolicyMapping: TypeAlias = dict[str, Any]
"""Keys of a session's configuration; with `preset`, changes to that preset; with `label`, named."""

AXIS_OF_KEY = {
    "boundaries": "boundaries",
    "selector": "selectors",
    "slow_step": "slow_steps",
    "memory.selected_tokens": "selected_tokens",
    "sampling.seed": "seeds",
}
"""Keys of a configuration that have an axis of their own."""
_LABEL_LIMIT_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class BoundarySet:
    """A named set of boundary detectors: one value of the axis `boundaries`.

    Attributes:
        name: What the results call it.
        entries: The detectors, any of which opens a slow step.
    """

    name: str
    entries: tuple[BoundaryEntry, ...]

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        # `as_boundary_sets` has built and checked them: pydantic alone would lose their names.
        return core_schema.is_instance_schema(cls)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "array", "items": {"type": "object"}}


def entry_label(entry: PluginEntry) -> str:
    """A plugin entry in results: `span(radius_tokens=8)`, the bare name without options."""
    options = ", ".join(f"{key}={_plain(value)}" for key, value in entry.options.items())
    return f"{entry.name}({options})" if options else entry.name


def as_boundary_sets(value: object) -> tuple[BoundarySet, ...]:
    """Read the axis `boundaries`: `{name: [entries]}` or `[[entries], entry, ...]`.

    Raises:
        PydanticCustomError: For pydantic to collect; one problem per wrong entry.
    """
    if isinstance(value, Mapping):
        named = [(str(name), name, entries) for name, entries in value.items()]
    elif isinstance(value, (list, tuple)):
        if all(isinstance(item, BoundarySet) for item in value):
            return tuple(value)
        named = [(str(index), None, entries) for index, entries in enumerate(value)]
    else:
        allowed = "a mapping of names to lists of detectors, or a list of such lists"
        raise problems_error([Problem("", got=show_value(value), allowed=allowed)])
    problems: list[Problem] = []
    found = [_boundary_set(path, name, entries, problems) for path, name, entries in named]
    if problems:
        raise problems_error(problems)
    return tuple(found)


def _boundary_set(path: str, name: object, value: object, problems: list[Problem]) -> BoundarySet:
    items = value if isinstance(value, (list, tuple)) else [value]
    entries: list[BoundaryEntry] = []
    for index, item in enumerate(items):
        try:
            entries.append(BoundaryEntry.parse(_long_form(item)))
        except PydanticCustomError as error:
            found: Iterable[Problem] = (error.context or {})["problems"]
            problems += [problem.below([path, index]) for problem in found]
    label = " + ".join(map(entry_label, entries)) if name is None else str(name)
    if name is not None:
        problems += check_label(path, label)
    return BoundarySet(label or "no detector", tuple(entries))


def as_selectors(value: object) -> object:
    """Read the axis `selectors`: a bare name stands for an entry without options."""
    if isinstance(value, (list, tuple)):
        return tuple(_long_form(item) for item in value)
    return value


def as_policy(value: object) -> object:
    """Read a policy: a bare name stands for a preset."""
    return {"preset": value} if isinstance(value, str) else value


def check_label(path: str, label: str) -> list[Problem]:
    """What is wrong with a name that a user gave to a policy or a set of detectors."""
    printable = label.isprintable() and label.strip() == label
    if label and printable and len(label) <= _LABEL_LIMIT_CHARACTERS and label != "dense":
        return []
    allowed = (
        f"1 to {_LABEL_LIMIT_CHARACTERS} printable characters, no blanks at the ends; "
        "dense is the name of the reference"
    )
    return [Problem(path, "unusable name", got=show_value(label), allowed=allowed)]


def policy_config(policy: Mapping[str, Any], changes: Mapping[str, Any] = {}) -> SessionConfig:
    """The configuration that a policy mapping stands for, with changes merged into it.

    Raises:
        ConfigError: It is not valid.
    """
    keys: Any = {key: value for key, value in policy.items() if key not in ("preset", "label")}
    merged = merge_deeply(keys, changes)
    if "preset" in policy:
        return SessionConfig.preset(policy["preset"], **merged)
    return SessionConfig.model_validate(merged)


def problems_with(make: Callable[[], SessionConfig]) -> list[Problem]:
    """What is wrong with a configuration; empty when it is valid."""
    try:
        make()
    except ConfigError as error:
        if isinstance(error.__cause__, ValidationError):
            return problems_of(error.__cause__, SessionConfig)
        return [Problem("", str(error))]
    return []


def check_base(policy: PolicyMapping) -> PolicyMapping:
    """Refuse a base with wrong keys or values; relations between keys are left to `expand`.

    An axis may mend them: several evidence queries are wrong with `observe` and right on an axis
    of `rectify` and `verify`.

    Raises:
        PydanticCustomError: For pydantic to collect.
    """
    problems = _reserved(policy)
    if "label" in policy:
        problems.append(Problem("label", "only entries of presets have one"))
    problems += [
        problem
        for problem in problems_with(lambda: policy_config(policy))
        if not _is_relation(problem)
    ]
    if problems:
        raise problems_error(problems)
    return policy


def check_preset(policy: PolicyMapping) -> PolicyMapping:
    """Refuse an entry of `presets` that cannot run.

    Raises:
        PydanticCustomError: For pydantic to collect.
    """
    problems = _reserved(policy)
    if "preset" not in policy:
        allowed = "a preset's name, or a mapping with the key preset"
        problems.append(Problem("preset", "missing", got=show_value(policy), allowed=allowed))
    if "label" in policy:
        problems += check_label("label", str(policy["label"]))
    problems += problems_with(lambda: policy_config(policy))
    if problems:
        raise problems_error(problems)
    return policy


def check_settings(axes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Refuse dotted keys that are no settings, and values that they do not take.

    Raises:
        PydanticCustomError: For pydantic to collect.
    """
    problems: list[Problem] = []
    for key, values in axes.items():
        if key in AXIS_OF_KEY or key == "mode":
            remedy = f"use {AXIS_OF_KEY[key]}" if key in AXIS_OF_KEY else "dense is always played"
            problems.append(Problem(key, "is no axis of settings", remedy=remedy))
            continue
        for index, value in enumerate(values):
            found = problems_with(lambda k=key, v=value: policy_config(nested(k, v)))  # type: ignore[misc]
            problems += [
                problem.below([f"{key}[{index}]"]) for problem in found if not _is_relation(problem)
            ]
    if problems:
        raise problems_error(problems)
    return axes


def nested(key: str, value: object) -> dict[str, Any]:
    """A dotted key as nested mappings: `memory.sink_tokens` -> {"memory": {"sink_tokens": ...}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _reserved(policy: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if policy.get("mode") == "dense":
        problems.append(
            Problem("mode", got="'dense'", allowed="slow_fast", remedy="dense is always played")
        )
    sampling = policy.get("sampling")
    if isinstance(sampling, Mapping) and "seed" in sampling:
        problems.append(Problem("sampling.seed", "comes from the grid", remedy="use seeds"))
    return problems


def _is_relation(problem: Problem) -> bool:
    """Whether a problem is about how several keys fit together: its path names them all."""
    return ", " in problem.path


def _long_form(item: object) -> object:
    return {"name": item} if isinstance(item, str) else item


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
