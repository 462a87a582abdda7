"""What plugins have registered: named detectors and selectors, each with its owner.

Holds what was registered and checks registrations; loading plugin modules is `plugin_loading`,
building the objects is `plugins`. Knows no concrete plugin and imports no torch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from sfi_agent.errors import ConfigError, PluginError, explain

__all__ = ["Owner", "PluginKind", "Registered", "RegistrationDesk", "Registry", "unknown_name"]

PluginKind = Literal["detector", "selector"]

BUILT_IN = "built-in"
_NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_FACTORY_ARGUMENTS: Mapping[PluginKind, tuple[str, ...]] = MappingProxyType(
    {"detector": ("config", "tokenizer"), "selector": ("config",)}
)


@dataclass(frozen=True, slots=True)
class Owner:
    """The plugin that registered something.

    Attributes:
        plugin: Name of the plugin: its entry-point name, or the module name of a built-in.
        distribution: Distribution it was installed with; empty for built-ins.
        version: Version of that distribution; empty for built-ins.
        value: What the entry point points to ("package.module"), for messages.
    """

    plugin: str
    distribution: str = ""
    version: str = ""
    value: str = ""

    @property
    def origin(self) -> str:
        """Distribution and version in one phrase, or "built-in"."""
        return f"{self.distribution} {self.version}".strip() or BUILT_IN

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} ({self.origin})"

    def error(
        self, attempted: str, cause: str, *, allowed: str = "", remedy: str = ""
    ) -> PluginError:
        """A PluginError that names this plugin, its distribution, and the cause."""
        message = explain(f"{self} {attempted}", got=cause, allowed=allowed, remedy=remedy)
        return PluginError(message, plugin=self.plugin, distribution=self.origin)


@dataclass(frozen=True, slots=True)
class Registered:
    """One detector or selector that configurations can name.

    Attributes:
        name: The name that configurations use.
        kind: "detector" or "selector".
        config_model: The pydantic model of its options; every field has a default.
        factory: `factory(config, tokenizer)` for detectors, `factory(config)` for selectors.
        owner: The plugin that registered it.
    """

    name: str
    kind: PluginKind
    config_model: type[BaseModel]
    factory: Callable[..., Any]
    owner: Owner

    @property
    def origin(self) -> str:
        """Distribution and version, or "built-in"."""
        return self.owner.origin


@dataclass(frozen=True, slots=True)
class Registry:
    """Everything the loaded plugins offer; read only.

    Attributes:
        detectors: Boundary detectors by name, in order of registration.
        selectors: Selectors by name, in order of registration.
        owners: Every loaded plugin, also those that registered nothing.
        blocked: Names of plugins that were installed but blocked on purpose.
    """

    detectors: Mapping[str, Registered]
    selectors: Mapping[str, Registered]
    owners: tuple[Owner, ...] = ()
    blocked: tuple[str, ...] = ()

    def find(self, kind: PluginKind, name: str) -> Registered:
        """The entry of that name.

        Raises:
            ConfigError: The name is unknown; lists the known ones with their origin.
        """
        known = self.of_kind(kind)
        if name not in known:
            raise ConfigError(unknown_name(kind, name, known))
        return known[name]

    def of_kind(self, kind: PluginKind) -> Mapping[str, Registered]:
        """The detectors or the selectors."""
        return self.detectors if kind == "detector" else self.selectors


def unknown_name(kind: PluginKind, name: object, known: Mapping[str, Registered]) -> str:
    """The sentence for a name that no plugin registered."""
    listed = ", ".join(f"{entry.name} ({entry.origin})" for entry in known.values()) or "none"
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"Perhaps {close[0]!r} was meant" if close else "Install the plugin that provides it"
    return explain(f"no {kind} has this name", got=repr(name), allowed=listed, remedy=hint)


class RegistrationDesk:
    """Collects what plugins register, one plugin at a time; refuses what breaks the contract."""

    def __init__(self) -> None:
        self._entries: dict[PluginKind, dict[str, Registered]] = {"detector": {}, "selector": {}}

    def collect(self, owner: Owner, offers: Mapping[PluginKind, Callable[..., Any]]) -> None:
        """Let one plugin register; keeps all of its registrations or, on an error, none.

        Args:
            owner: The plugin.
            offers: Per kind a hook caller that is limited to this plugin and takes `register`.

        Raises:
            PluginError: A registration is refused, or the hook itself failed.
        """
        staged: list[Registered] = []
        for kind, call_hook in offers.items():
            register = self._register_function(kind, owner, staged)
            try:
                call_hook(register=register)
            except Exception as error:
                if isinstance(error, PluginError) and error.plugin == owner.plugin:
                    raise
                raise owner.error(
                    f"failed while it registered its {kind}s", describe_exception(error)
                ) from error
        for entry in staged:
            self._entries[entry.kind][entry.name] = entry

    def registry(self, owners: tuple[Owner, ...], blocked: tuple[str, ...]) -> Registry:
        """What was collected, read only."""
        return Registry(
            detectors=MappingProxyType(dict(self._entries["detector"])),
            selectors=MappingProxyType(dict(self._entries["selector"])),
            owners=owners,
            blocked=blocked,
        )

    def _register_function(
        self, kind: PluginKind, owner: Owner, staged: list[Registered]
    ) -> Callable[..., None]:
        def register(name: str, Config: type[BaseModel], factory: Callable[..., Any]) -> None:
            self._check_name(kind, name, owner, staged)
            _check_config_model(kind, name, Config, owner)
            _check_factory(kind, name, factory, owner)
            staged.append(Registered(name, kind, Config, factory, owner))

        return register

    def _check_name(
        self, kind: PluginKind, name: object, owner: Owner, staged: list[Registered]
    ) -> None:
        if not isinstance(name, str) or not _NAME_PATTERN.fullmatch(name):
            raise owner.error(
                f"registered a {kind} under an unusable name",
                repr(name),
                allowed="letters, digits, '_', '-' and '.', a letter first",
            )
        taken = self._entries[kind].get(name)
        mine = next((entry for entry in staged if (entry.kind, entry.name) == (kind, name)), None)
        if taken or mine:
            first = taken.owner if taken else owner
            raise owner.error(
                f"registered the {kind} {name!r} a second time",
                f"a name that {first} has already taken",
                allowed="names that no other plugin uses",
                remedy="Rename one of the two, or uninstall one of the two distributions",
            )


def describe_exception(error: BaseException) -> str:
    """Type and text of an exception in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_config_model(kind: PluginKind, name: str, model: object, owner: Owner) -> None:
    attempted = f"registered the {kind} {name!r} with an unusable options model"
    if not (inspect.isclass(model) and issubclass(model, BaseModel)):
        raise owner.error(attempted, repr(model), allowed="a subclass of pydantic.BaseModel")
    if model.model_config.get("extra") != "forbid":
        raise owner.error(
            attempted,
            f"{model.__name__} with extra={model.model_config.get('extra')!r}",
            allowed='extra="forbid", so that a misspelt option is an error',
            remedy="Derive it from sfi_agent.Settings",
        )
    fields = model.model_fields
    without_default = [field for field, info in fields.items() if info.is_required()]
    if without_default:
        raise owner.error(
            attempted,
            f"{model.__name__} with fields that have no default: {', '.join(without_default)}",
            allowed="a default for every option",
        )
    if "name" in fields or any(info.alias == "name" for info in fields.values()):
        raise owner.error(
            attempted, f"{model.__name__} with an option 'name'", allowed="any other option name"
        )
    try:
        json.dumps(model().model_dump(mode="json", by_alias=True), allow_nan=False)
    except (ValidationError, ValueError, TypeError) as error:
        raise owner.error(
            attempted,
            f"{model.__name__}() fails: {describe_exception(error)}",
            allowed="defaults that are valid and plain data",
        ) from error


def _check_factory(kind: PluginKind, name: str, factory: object, owner: Owner) -> None:
    expected = f"factory({', '.join(_FACTORY_ARGUMENTS[kind])})"
    attempted = f"registered the {kind} {name!r} with an unusable factory"
    if not callable(factory):
        raise owner.error(attempted, repr(factory), allowed=expected)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # Some callables written in C have no signature; calling them will tell.
    try:
        signature.bind(*_FACTORY_ARGUMENTS[kind])
    except TypeError as error:
        raise owner.error(attempted, f"{signature} ({error})", allowed=expected) from error
