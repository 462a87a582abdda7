"""Builds the detectors and selectors that configurations name, and checks what factories return.

Loading is `load_plugins`; a hook is never called while tokens are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from sfi_agent.errors import ConfigError, SfiError
from sfi_agent.plugin_loading import (
    PluginLoader,
    collect_plugin_errors,
    load_plugins,
    temporary_plugins,
)
from sfi_agent.plugin_options import BoundaryEntry, PluginEntry, SelectorEntry, validate_options
from sfi_agent.problems import Problem, problem_lines
from sfi_agent.protocols import DETECTOR_NEEDS, SELECTOR_NEEDS, BoundaryDetector, Selector
from sfi_agent.registry import Owner, Registered, Registry, describe_exception

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Owner",
    "PluginLoader",
    "Registered",
    "Registry",
    "build_detector",
    "build_selector",
    "collect_plugin_errors",
    "load_plugins",
    "temporary_plugins",
]


def build_selector(entry: Mapping[str, Any] | SelectorEntry, *, default_seed: int = 0) -> Selector:
    """The selector that an entry such as `{"name": "kl_fusion", "alpha": 0.5}` names.

    Args:
        entry: Name and options, or the `selector` of a configuration.
        default_seed: Seed of a seeded selector whose entry names none; sessions pass
            `sampling.seed`.

    Raises:
        ConfigError: The name or an option is wrong.
        PluginError: A plugin is broken, or its factory failed or returned something else.
    """
    parsed = _parse(SelectorEntry, entry)
    registered = load_plugins().find("selector", parsed.name)
    selector = _call_factory(registered, _options(registered, parsed, default_seed))
    _check_needs(registered, selector, Selector, ("select",), SELECTOR_NEEDS)
    assert isinstance(selector, Selector)
    return selector


def build_detector(
    entry: Mapping[str, Any] | BoundaryEntry,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    default_seed: int = 0,
) -> BoundaryDetector:
    """The boundary detector that an entry such as `{"name": "entropy", "when": "now"}` names.

    Args:
        entry: Name and options, or one of the `boundaries` of a configuration.
        tokenizer: The tokenizer of the model; None where there is none. Detectors that need
            text or a vocabulary refuse None.
        default_seed: Seed of a seeded detector whose entry names none; sessions pass
            `sampling.seed`.

    Raises:
        ConfigError: The name or an option is wrong.
        PluginError: A plugin is broken, or its factory failed or returned something else.
    """
    parsed = _parse(BoundaryEntry, entry)
    registered = load_plugins().find("detector", parsed.name)
    detector = _call_factory(registered, _options(registered, parsed, default_seed), tokenizer)
    methods = ("reset", "after_step", "after_token", "snapshot", "restore")
    _check_needs(registered, detector, BoundaryDetector, methods, DETECTOR_NEEDS)
    assert isinstance(detector, BoundaryDetector)
    return detector


def _parse(entry_class: type[Any], entry: object) -> Any:
    try:
        return entry_class.parse(entry)
    except PydanticCustomError as error:
        problems: list[Problem] = (error.context or {})["problems"]
        attempted = f"the {entry_class.kind} cannot be built"
        raise ConfigError(problem_lines(attempted, problems)) from error


def _options(registered: Registered, entry: PluginEntry, default_seed: int) -> BaseModel:
    options = validate_options(registered, entry.options)
    if "seed" in registered.config_model.model_fields and options.model_dump()["seed"] is None:
        return validate_options(registered, {**entry.options, "seed": default_seed})
    return options


def _call_factory(registered: Registered, *arguments: object) -> object:
    try:
        return registered.factory(*arguments)
    except SfiError:
        raise
    except Exception as error:
        raise registered.owner.error(
            f"failed while it built the {registered.kind} {registered.name!r}",
            describe_exception(error),
        ) from error


def _check_needs(
    registered: Registered,
    built: object,
    protocol: type[Any],
    methods: tuple[str, ...],
    allowed_needs: frozenset[str],
) -> None:
    attempted = (
        f"built something for {registered.name!r} that is not a {protocol.__name__} of sfi_agent"
    )
    missing = [name for name in methods if not callable(getattr(built, name, None))]
    if missing:
        raise registered.owner.error(
            attempted,
            f"{type(built).__name__} without the method{'s' * (len(missing) > 1)} "
            f"{', '.join(missing)}",
            allowed=f"needs, {', '.join(methods)}",
        )
    allowed = f"a subset of {{{', '.join(sorted(allowed_needs))}}}"
    try:
        needs = built.needs  # type: ignore[attr-defined]
    except Exception as error:
        cause = f"{type(built).__name__} without readable needs ({describe_exception(error)})"
        raise registered.owner.error(attempted, cause, allowed=allowed) from error
    if not isinstance(needs, (set, frozenset)) or not needs <= allowed_needs:
        raise registered.owner.error(attempted, f"needs = {needs!r}", allowed=allowed)
