"""The hooks of sfi-agent. Plugins implement them with `sfi_agent.hookimpl`.

Hooks only collect: they are called once, when plugins are loaded. The objects that the registered
factories return are called directly while tokens are decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

__all__ = ["hookimpl", "hookspec", "sfi_register_boundary_detectors", "sfi_register_selectors"]

hookspec = pluggy.HookspecMarker("sfi_agent")
hookimpl = pluggy.HookimplMarker("sfi_agent")


@hookspec
def sfi_register_boundary_detectors(register: Callable[..., Any]) -> None:
    """Offer boundary detectors to configurations.

    When: once, when plugins are loaded (at the first configuration that names a plugin, by
    `sfi-agent plugins`, or by `build_detector`). Never while tokens are decoded.
    `register(name, Config, factory)`: call it once per detector. `name` is what configurations
    say; `Config` is a pydantic model class with `extra="forbid"`, a default for every field, and
    no torch import behind it; `factory(config, tokenizer)` returns a `BoundaryDetector`. Do not
    keep `register` after the call.
    Return: nothing; a returned value is ignored. Not calling `register` offers nothing.
    Order: none. Names are unique; a second plugin that registers a taken name is a PluginError.
    How often: one call per plugin and loading; the factory runs once per session.
    """


@hookspec
def sfi_register_selectors(register: Callable[..., Any]) -> None:
    """Offer selectors to configurations.

    When: once, when plugins are loaded (at the first configuration that names a plugin, by
    `sfi-agent plugins`, or by `build_selector`). Never while tokens are decoded.
    `register(name, Config, factory)`: call it once per selector. `name` is what configurations
    say; `Config` is a pydantic model class with `extra="forbid"`, a default for every field, and
    no torch import behind it; `factory(config)` returns a `Selector`. Do not keep `register`
    after the call.
    Return: nothing; a returned value is ignored. Not calling `register` offers nothing.
    Order: none. Names are unique; a second plugin that registers a taken name is a PluginError.
    How often: one call per plugin and loading; the factory runs once per session.
    """
