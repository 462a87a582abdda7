"""Multiplies the axes of a grid out into policies, and says which combinations are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.config import SessionConfig
from sfi_agent.config_model import merge_deeply
from sfi_agent.evaluation.ablation.entries import (
    entry_label,
    nested,
    policy_config,
    problems_with,
)
from sfi_agent.evaluation.ablation.policy import DENSE, Policy, PolicySet, Skipped
from sfi_agent.problems import Problem, problems_error, show_value

if TYPE_CHECKING:
    from sfi_agent.evaluation.ablation.grid import AblationGrid

__all__ = ["expand"]

_SEPARATOR = " / "


@dataclass(frozen=True, slots=True)
class _Choice:
    """One value of one axis.

    Attributes:
        axis: Name of the axis, as grids write it.
        label: The value in names and messages.
        changes: What it changes in a configuration.
        matches: Forms in which an exclude rule may write it.
    """

    axis: str
    label: str
    changes: Mapping[str, Any]
    matches: tuple[Any, ...]


def expand(grid: AblationGrid) -> PolicySet:
    """All policies of a grid, dense not among them.

    Raises:
        PydanticCustomError: For pydantic to collect: combinations contradict themselves (unless
            `invalid` is skip), exclude rules are wrong, names collide, or nothing is left.
    """
    axes = _axes(grid)
    problems = _exclude_problems(grid, axes)
    if problems:
        raise problems_error(problems)
    policies: list[Policy] = []
    skipped: list[Skipped] = []
    invalid: dict[str, list[str]] = {}
    for name, choices in _combinations(grid, axes):
        rule = _excluding_rule(grid.exclude, choices, axes)
        changes = _merged(choices)
        found = [] if rule else problems_with(lambda c=changes: policy_config(grid.base, c))  # type: ignore[misc]
        if rule:
            skipped.append(Skipped(name, f"exclude rule {rule} of the grid leaves it out"))
        elif found:
            reason = " ".join(problem.line() for problem in found)
            skipped.append(Skipped(name, reason))
            invalid.setdefault(reason, []).append(name)
        else:
            _add(policies, skipped, _crossed(grid, name, choices, changes))
    for entry in grid.presets:
        _add(policies, skipped, _from_preset(entry))
    problems = _final_problems(grid, policies, invalid)
    if problems:
        raise problems_error(problems)
    sampling = grid.base.get("sampling", {})
    dense = Policy(DENSE, SessionConfig(mode="dense", sampling=sampling))
    return PolicySet(dense, tuple(policies), tuple(skipped))


def _axes(grid: AblationGrid) -> dict[str, list[_Choice]]:
    axes: dict[str, list[_Choice]] = {}
    for item in grid.boundaries:
        changes = {"boundaries": item.entries}
        axes.setdefault("boundaries", []).append(
            _Choice("boundaries", item.name, changes, (item.name,))
        )
    for entry in grid.selectors:
        label = entry_label(entry)
        axes.setdefault("selectors", []).append(
            _Choice("selectors", label, {"selector": entry}, (label, entry.name, entry.flat()))
        )
    plain = {"selected_tokens": "memory.selected_tokens", "slow_steps": "slow_step"}
    values: dict[str, tuple[str, Sequence[Any]]] = {
        axis: (key, getattr(grid, axis)) for axis, key in plain.items()
    }
    values |= {key: (key, found) for key, found in grid.settings.items()}
    for axis, (key, found) in values.items():
        for value in found:
            label = str(value) if axis in plain else f"{key.rpartition('.')[2]}={_plain(value)}"
            changes = nested(key, value)
            axes.setdefault(axis, []).append(_Choice(axis, label, changes, (value, label)))
    return axes


def _combinations(
    grid: AblationGrid, axes: Mapping[str, list[_Choice]]
) -> Iterator[tuple[str, tuple[_Choice, ...]]]:
    if not axes and not grid.base and grid.presets:
        return  # Presets alone: nobody asked for the defaults beside them.
    varying = {axis for axis, choices in axes.items() if len(choices) > 1}
    for choices in itertools.product(*axes.values()):
        labels = [choice.label for choice in choices if choice.axis in varying]
        yield _SEPARATOR.join(labels) or str(grid.base.get("preset", "base")), choices


def _merged(choices: Sequence[_Choice]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for choice in choices:
        changes = merge_deeply(changes, choice.changes)
    return changes


def _crossed(
    grid: AblationGrid, name: str, choices: Sequence[_Choice], changes: Mapping[str, Any]
) -> Policy:
    config = policy_config(grid.base, changes)
    labels = {choice.axis: choice.label for choice in choices}
    return Policy(
        name,
        config,
        grid.base.get("preset"),
        labels.get("boundaries") or _boundaries_label(config),
        {key: choice.matches[0] for choice in choices if (key := choice.axis) in grid.settings},
    )


def _from_preset(entry: Mapping[str, Any]) -> Policy:
    config = policy_config(entry)
    changes = {key: value for key, value in entry.items() if key not in ("preset", "label")}
    described = ", ".join(f"{key}={_plain(value)}" for key, value in _flat(changes))
    name = f"{entry['preset']}({described})" if described else str(entry["preset"])
    return Policy(
        str(entry.get("label", name)), config, str(entry["preset"]), _boundaries_label(config)
    )


def _boundaries_label(config: SessionConfig) -> str:
    return " + ".join(map(entry_label, config.boundaries)) or "no detector"


def _add(policies: list[Policy], skipped: list[Skipped], policy: Policy) -> None:
    same = next((other for other in policies if other.config == policy.config), None)
    if same is None or same.name == policy.name:
        policies.append(policy)
    else:
        skipped.append(Skipped(policy.name, f"it is the same configuration as {same.name!r}"))


def _exclude_problems(grid: AblationGrid, axes: Mapping[str, Sequence[_Choice]]) -> list[Problem]:
    problems = []
    for index, rule in enumerate(grid.exclude):
        for axis, value in rule.items():
            path = f"exclude.{index}.{axis}"
            if axis not in axes:
                allowed = ", ".join(axes) or "none: the grid has no axis"
                problems.append(Problem(path, "is no axis of this grid", allowed=allowed))
                continue
            for wanted in _alternatives(value, axes[axis]):
                if not any(wanted in choice.matches for choice in axes[axis]):
                    allowed = ", ".join(choice.label for choice in axes[axis])
                    problems.append(Problem(path, got=show_value(wanted), allowed=allowed))
    return problems


def _excluding_rule(
    rules: Sequence[Mapping[str, Any]],
    choices: Sequence[_Choice],
    axes: Mapping[str, Sequence[_Choice]],
) -> int:
    """Number, from 1, of the first rule that leaves the combination out; 0 for none."""
    by_axis = {choice.axis: choice for choice in choices}
    for number, rule in enumerate(rules, start=1):
        if all(
            any(wanted in by_axis[axis].matches for wanted in _alternatives(value, axes[axis]))
            for axis, value in rule.items()
        ):
            return number
    return 0


def _alternatives(value: object, choices: Sequence[_Choice]) -> Sequence[Any]:
    """The values that a rule names: one, or a list of them; a list may also be a value itself."""
    is_value = any(value in choice.matches for choice in choices)
    return value if isinstance(value, (list, tuple)) and not is_value else [value]


def _final_problems(
    grid: AblationGrid, policies: Sequence[Policy], invalid: Mapping[str, Sequence[str]]
) -> list[Problem]:
    problems = []
    if grid.invalid == "error":
        for reason, names in invalid.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedy = "leave such combinations out with exclude, or set invalid: skip"
            problems.append(
                Problem("", f"the combination {names[0]!r}{more}: {reason}", remedy=remedy)
            )
    names_seen = [policy.name for policy in policies]
    for name in dict.fromkeys(name for name in names_seen if names_seen.count(name) > 1):
        remedy = "give the entry of presets a label"
        problems.append(Problem("", f"two policies have the name {name!r}", remedy=remedy))
    if not policies and not problems:
        problems.append(Problem("", "every combination of the grid is left out"))
    return problems


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and "name" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    return str(list(value)) if isinstance(value, tuple) else str(value)
