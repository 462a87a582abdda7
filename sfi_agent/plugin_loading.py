"""Finds plugins and loads them, loudly: whatever pluggy would skip is a PluginError here.

Built-ins come from a tuple of module names, third parties from the entry-point group
`sfi_agent`; both go through the same manager and the same hooks.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pluggy

from sfi_agent import hookspecs
from sfi_agent.errors import PluginError, explain
from sfi_agent.registry import (
    Owner,
    PluginKind,
    RegistrationDesk,
    Registry,
    describe_exception,
)

__all__ = [
    "BUILT_IN_MODULES",
    "ENTRY_POINT_GROUP",
    "PluginLoader",
    "collect_plugin_errors",
    "load_plugins",
    "temporary_plugins",
]

BUILT_IN_MODULES = ("sfi_policies.plugin", "sfi_selectors.plugin")
ENTRY_POINT_GROUP = "sfi_agent"
_HOOKS: Mapping[PluginKind, str] = {
    "detector": hookspecs.sfi_register_boundary_detectors.__name__,
    "selector": hookspecs.sfi_register_selectors.__name__,
}


class PluginLoader:
    """Loads plugins once into one `pluggy.PluginManager` and collects what they register.

    Errors are kept in `errors` in the order they were met; the caller decides whether the first
    one is raised or all are shown. A plugin with an error takes part in nothing.
    """

    def __init__(
        self,
        *,
        built_in_modules: Collection[str] = BUILT_IN_MODULES,
        load_entry_points: bool = True,
        extra_plugins: Mapping[str, object] | None = None,
        blocked: Collection[str] = (),
    ) -> None:
        """Prepare to load.

        Args:
            built_in_modules: Import names of plugin modules that belong to this distribution.
            load_entry_points: Whether installed distributions are asked for plugins.
            extra_plugins: Plugin objects by name that are in memory only, for tests.
            blocked: Plugin names that must not be loaded; they are reported, not errors.
        """
        self.errors: list[PluginError] = []
        self._manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._owners: dict[str, Owner] = {}
        self._blocked_met: list[str] = []
        self._built_in_modules = tuple(built_in_modules)
        self._load_entry_points = load_entry_points
        self._extra_plugins = dict(extra_plugins or {})
        for name in blocked:
            self._manager.set_blocked(name)

    def load(self) -> Registry:
        """Load every plugin and return what they offer; see `errors` for what went wrong."""
        with _marked_as_loading():
            self._load_all()
            return self._collect()

    def _load_all(self) -> None:
        for module_name in self._built_in_modules:
            self._load_built_in(module_name)
        for name, plugin in self._extra_plugins.items():
            owner = Owner(name, distribution="in memory", value=repr(plugin))
            self._guarded(owner, self._registration(name, plugin))
        if self._load_entry_points:
            for entry_point in self._entry_points():
                self._load_entry_point(entry_point)

    def _registration(self, name: str, plugin: object) -> Callable[[], object]:
        return lambda: self._manager.register(plugin, name)

    def _load_built_in(self, module_name: str) -> None:
        def load() -> object:
            return self._manager.register(importlib.import_module(module_name), module_name)

        self._guarded(Owner(module_name, value=module_name), load)

    def _entry_points(self) -> tuple[importlib.metadata.EntryPoint, ...]:
        """Entry points that may be loaded; a name that is taken is an error and left out."""
        first_owners = dict(self._owners)
        usable: list[importlib.metadata.EntryPoint] = []
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            owner = _owner_of(entry_point)
            first = first_owners.setdefault(owner.plugin, owner)
            if first is owner:
                usable.append(entry_point)
                continue
            self.errors.append(
                owner.error(
                    "cannot be loaded under this name",
                    f"a name that {first} ({first.value}) has already taken",
                    allowed=f"entry-point names of group {ENTRY_POINT_GROUP!r} that are unique",
                    remedy="Uninstall one of the two distributions, or rename its entry point",
                )
            )
        return tuple(usable)

    def _load_entry_point(self, entry_point: importlib.metadata.EntryPoint) -> None:
        owner = _owner_of(entry_point)

        def load() -> object:
            count = self._manager.load_setuptools_entrypoints(ENTRY_POINT_GROUP, name=owner.plugin)
            if count != 1:
                raise RuntimeError(f"pluggy loaded {count} entry points of this name")
            return owner.plugin

        self._guarded(owner, load)

    def _guarded(self, owner: Owner, load: Callable[[], object]) -> None:
        """Run one loading step; a failure is charged to its owner and takes the plugin out."""
        self._owners[owner.plugin] = owner
        if self._manager.is_blocked(owner.plugin):
            self._blocked_met.append(owner.plugin)
            del self._owners[owner.plugin]
            return
        try:
            load()
            # Checked after each plugin, so that a misspelt hook is charged to its distribution.
            self._manager.check_pending()
            self._check_plugin(owner)
        except Exception as error:
            self._drop(owner)
            if isinstance(error, PluginError) and error.plugin == owner.plugin:
                self.errors.append(error)
                return
            wrapped = owner.error(
                f"from {owner.value!r} cannot be loaded" if owner.value else "cannot be loaded",
                describe_exception(error),
                remedy="Repair or uninstall that distribution; `sfi-agent plugins` lists them all",
            )
            wrapped.__cause__ = error
            self.errors.append(wrapped)

    def _check_plugin(self, owner: Owner) -> None:
        plugin = self._manager.get_plugin(owner.plugin)
        hash(plugin)  # pluggy tells plugins apart by hash; better refused here than met there.
        if not self._manager.get_hookcallers(plugin):
            raise owner.error(
                "implements no hook",
                "an object without implementations marked by sfi_agent.hookimpl",
                allowed=", ".join(_HOOKS.values()),
            )

    def _drop(self, owner: Owner) -> None:
        self._owners.pop(owner.plugin, None)
        if self._manager.has_plugin(owner.plugin):
            self._manager.unregister(name=owner.plugin)

    def _collect(self) -> Registry:
        desk = RegistrationDesk()
        plugins = dict(self._manager.list_name_plugin())
        for owner in tuple(self._owners.values()):
            others = [plugin for name, plugin in plugins.items() if name != owner.plugin]
            offers: dict[PluginKind, Callable[..., Any]] = {
                kind: self._manager.subset_hook_caller(hook, remove_plugins=others)
                for kind, hook in _HOOKS.items()
            }
            try:
                desk.collect(owner, offers)
            except PluginError as error:
                self.errors.append(error)
                self._drop(owner)
        return desk.registry(tuple(self._owners.values()), tuple(self._blocked_met))


def _owner_of(entry_point: importlib.metadata.EntryPoint) -> Owner:
    distribution = entry_point.dist
    return Owner(
        plugin=entry_point.name,
        distribution=distribution.name if distribution else "unknown distribution",
        version=distribution.version if distribution else "",
        value=entry_point.value,
    )


_this_thread = threading.local()


@contextmanager
def _marked_as_loading() -> Iterator[None]:
    _this_thread.is_loading = True
    try:
        yield
    finally:
        _this_thread.is_loading = False


class _LoadedPlugins:
    """The registry of this process: loaded on first use, and replaceable for tests."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._registry: Registry | None = None

    def get(self, *, reload: bool) -> Registry:
        if getattr(_this_thread, "is_loading", False):
            raise PluginError(
                explain(
                    "a plugin asked for the loaded plugins while plugins were being loaded",
                    allowed="plugin modules that build no configuration, detector or selector "
                    "while they are imported",
                )
            )
        with self._lock:
            if self._registry is None or reload:
                self._registry = self._load()
            return self._registry

    def replace(self, registry: Registry | None) -> Registry | None:
        with self._lock:
            previous, self._registry = self._registry, registry
            return previous

    def _load(self) -> Registry:
        loader = PluginLoader()
        registry = loader.load()
        if loader.errors:
            raise loader.errors[0]
        return registry


_loaded = _LoadedPlugins()


def load_plugins(*, reload: bool = False) -> Registry:
    """Everything that built-in and installed plugins offer; loaded once per process.

    Args:
        reload: Look for plugins again instead of returning what was found before.

    Raises:
        PluginError: A plugin is broken: name taken, import failed, unknown hook, wrong argument,
            unusable registration. It names plugin, distribution, version and cause.
    """
    return _loaded.get(reload=reload)


def collect_plugin_errors() -> tuple[Registry, tuple[PluginError, ...]]:
    """Load again, without raising: what works, and one error for each plugin that does not.

    For listings that must survive a broken plugin. Does not change what `load_plugins` returns.
    """
    loader = PluginLoader()
    registry = loader.load()
    return registry, tuple(loader.errors)


@contextmanager
def temporary_plugins(**plugins: object) -> Iterator[Registry]:
    """Add plugin objects or modules by name while the block runs, through the same door; for tests.

    Raises:
        PluginError: As `load_plugins`, also for the added ones.
    """
    loader = PluginLoader(extra_plugins=plugins)
    registry = loader.load()
    if loader.errors:
        raise loader.errors[0]
    previous = _loaded.replace(registry)
    try:
        yield registry
    finally:
        _loaded.replace(previous)
