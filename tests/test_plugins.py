"""Loading is loud: every way in which a plugin can be wrong is one PluginError that names it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfi_agent import (
    ConfigError,
    PluginError,
    SessionConfig,
    Settings,
    build_detector,
    build_selector,
    hookimpl,
    load_plugins,
)
from sfi_agent.plugin_loading import BUILT_IN_MODULES
from sfi_agent.plugins import PluginLoader, collect_plugin_errors, temporary_plugins
from sfi_agent.registry import Registry
from tests.distributions import installed, write_distribution
from tests.fakes import (
    FakeConfig,
    FakeDetector,
    FakeSelector,
    SeededConfig,
    detector_plugin,
    selector_plugin,
)

BUILT_IN_DETECTORS = {
    "punctuation",
    "spacy",
    "entropy",
    "interval",
    "random",
    "structure",
    "drift",
    "answer_start",
    "never",
}
BUILT_IN_SELECTORS = {
    "top_k",
    "per_head",
    "cumulative_mass",
    "kl_fusion",
    "span",
    "page",
    "question",
    "window",
    "random",
}

GOOD = """
from sfi_agent import hookimpl, Settings

class Config(Settings):
    pass

class Selector:
    needs = frozenset()
    def __init__(self, config): pass
    def select(self, evidence, budget): raise NotImplementedError

@hookimpl
def sfi_register_selectors(register):
    register("{name}", Config, Selector)
"""


def source(text: str) -> str:
    """A plugin module: the usual import, then this text."""
    return "from sfi_agent import hookimpl, Settings\n" + textwrap.dedent(text)


def load_only(**plugins: object) -> tuple[Registry, list[PluginError]]:
    """What a loader makes of these in-memory plugins, without built-ins and installed ones."""
    loader = PluginLoader(built_in_modules=(), load_entry_points=False, extra_plugins=plugins)
    return loader.load(), loader.errors


def only_error(**plugins: object) -> PluginError:
    """The one error that loading these plugins gives."""
    registry, errors = load_only(**plugins)
    assert len(errors) == 1, errors
    return errors[0]


# ---------------------------------------------------------------- built-ins


def test_built_ins_are_there_without_entry_points() -> None:
    loader = PluginLoader(load_entry_points=False)
    registry = loader.load()
    assert loader.errors == []
    assert set(registry.detectors) == BUILT_IN_DETECTORS
    assert set(registry.selectors) == BUILT_IN_SELECTORS
    for entry in (*registry.detectors.values(), *registry.selectors.values()):
        assert entry.origin == "built-in"
        assert entry.owner.plugin in BUILT_IN_MODULES


def test_loading_happens_once_unless_asked_again() -> None:
    first = load_plugins()
    assert load_plugins() is first
    assert load_plugins(reload=True) is not first
    assert dict(load_plugins().selectors) == dict(first.selectors)
    with pytest.raises(TypeError):
        first.selectors["x"] = first.selectors["top_k"]  # type: ignore[index]


def test_temporary_plugins_leave_no_trace_also_after_an_error() -> None:
    before = load_plugins()
    with pytest.raises(ZeroDivisionError):
        with temporary_plugins(fake=selector_plugin("fake")) as registry:
            assert load_plugins() is registry
            assert SessionConfig(selector={"name": "fake"}).selector.name == "fake"
            raise ZeroDivisionError
    assert load_plugins() is before
    with pytest.raises(ConfigError):
        SessionConfig(selector={"name": "fake"})


# ---------------------------------------------------------------- installed distributions


@pytest.mark.parametrize(
    ("plugin_source", "cause"),
    [
        pytest.param("import no_such_module_anywhere", "ModuleNotFoundError", id="import"),
        pytest.param("def", "SyntaxError", id="syntax"),
        pytest.param("raise RuntimeError('at import')", "RuntimeError: at import", id="raises"),
        pytest.param(
            source("""
            @hookimpl
            def sfi_register_selector(register): pass
            """),
            "sfi_register_selector",
            id="misspelt hook",
        ),
        pytest.param(
            source("""
            @hookimpl
            def sfi_register_selectors(registry): pass
            """),
            "registry",
            id="unknown argument",
        ),
        pytest.param("x = 1", "implements no hook", id="no hook"),
        pytest.param(
            source("""
            @hookimpl
            def sfi_register_selectors(register): register("x")
            """),
            "TypeError",
            id="wrong call of register",
        ),
        pytest.param(
            source("""
            @hookimpl
            def sfi_register_selectors(register): register("top_k", Settings, Settings)
            """),
            "'top_k' a second time",
            id="name of a built-in",
        ),
        pytest.param(
            source("""
            from sfi_agent import SessionConfig
            SessionConfig(selector={"name": "from_this_plugin"})
            """),
            "while plugins were being loaded",
            id="asks for plugins at import",
        ),
    ],
)
def test_a_broken_distribution_is_named_and_others_survive(
    plugin_source: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"broken_module": plugin_source, "good_module": GOOD.format(name="from_good")}
    points = {"broken": "broken_module"}
    write_distribution(tmp_path / "a", "acme-broken", modules, points, version="4.2")
    points = {"good": "good_module"}
    write_distribution(tmp_path / "a", "acme-good", {}, points, version="1.0")
    before = load_plugins()
    with installed(tmp_path / "a", monkeypatch):
        with pytest.raises(PluginError) as caught:
            load_plugins(reload=True)
        registry, errors = collect_plugin_errors()
    assert load_plugins() is before, "a failed reload must not replace what works"
    assert len(errors) == 1
    for error in (caught.value, errors[0]):
        assert error.plugin == "broken"
        assert error.distribution == "acme-broken 4.2"
        for part in ("'broken'", "acme-broken 4.2", cause):
            assert part in str(error)
    assert "from_good" in registry.selectors
    assert registry.selectors["from_good"].origin == "acme-good 1.0"
    assert BUILT_IN_SELECTORS <= set(registry.selectors)
    assert all(owner.plugin != "broken" for owner in registry.owners)


def test_an_entry_point_that_does_not_exist_in_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"broken": "half_module:plugin"}
    write_distribution(tmp_path, "acme-half", {"half_module": ""}, points, version="1.0")
    with installed(tmp_path, monkeypatch):
        _, (error,) = collect_plugin_errors()
    assert "half_module:plugin" in str(error) and "AttributeError" in str(error)
    assert isinstance(error.__cause__, AttributeError)


def test_an_entry_point_name_taken_twice_names_both_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        modules = {f"acme_{number}": GOOD.format(name=f"from_{number}")}
        points = {"same": f"acme_{number}"}
        write_distribution(tmp_path, f"acme-{number}", modules, points, version=f"{number}.0")
    with installed(tmp_path, monkeypatch):
        registry, (error,) = collect_plugin_errors()
    assert "acme-1 1.0" in str(error) and "acme-2 2.0" in str(error) and "'same'" in str(error)
    assert len({"from_1", "from_2"} & set(registry.selectors)) == 1


def test_an_entry_point_named_like_a_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {BUILT_IN_MODULES[0]: "acme_module"}
    write_distribution(tmp_path, "acme", {"acme_module": ""}, points, version="1.0")
    with installed(tmp_path, monkeypatch):
        registry, (error,) = collect_plugin_errors()
    assert "built-in" in str(error) and "acme 1.0" in str(error)
    assert set(registry.detectors) == BUILT_IN_DETECTORS


def test_one_module_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"first": "acme_module", "second": "acme_module"}
    modules = {"acme_module": GOOD.format(name="acme")}
    write_distribution(tmp_path, "acme", modules, points, version="1.0")
    with installed(tmp_path, monkeypatch):
        registry, (error,) = collect_plugin_errors()
    assert (error.plugin, error.distribution) == ("second", "acme 1.0")
    assert "already registered" in str(error)
    assert registry.selectors["acme"].owner.plugin == "first"


def test_a_blocked_plugin_is_reported_and_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"blocked_module": "raise RuntimeError"}
    write_distribution(tmp_path, "acme", modules, {"acme": "blocked_module"}, version="1.0")
    with installed(tmp_path, monkeypatch):
        loader = PluginLoader(blocked=["acme", "sfi_policies.plugin"])
        registry = loader.load()
        assert "blocked_module" not in sys.modules
    assert loader.errors == []
    assert registry.blocked == ("sfi_policies.plugin", "acme")
    assert not registry.detectors and set(registry.selectors) == BUILT_IN_SELECTORS


def test_a_missing_built_in_module_is_a_plugin_error() -> None:
    loader = PluginLoader(built_in_modules=["sfi_nothing.plugin"], load_entry_points=False)
    loader.load()
    (error,) = loader.errors
    assert error.distribution == "built-in" and "sfi_nothing" in str(error)


def test_loading_imports_no_torch(child_python: Callable[[str], str]) -> None:
    program = """
        import sys
        from sfi_agent import SessionConfig, load_plugins
        load_plugins()
        SessionConfig.preset("fast")
        loaded = {"torch", "transformers", "spacy"} & set(sys.modules)
        print(sorted(loaded))
    """
    assert child_python(program) == "[]"


# ---------------------------------------------------------------- what may be registered


class Required(Settings):
    number: int = Field()


class Lenient(BaseModel):
    number: int = 1


class Named(Settings):
    name: str = ""


class WrongDefault(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)
    number: int = Field(default=0, ge=1)


class NotData(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    thing: object = object()


class Infinite(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: float = float("inf")


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (Required, "fields that have no default: number"),
        (Lenient, "extra=None"),
        (Named, "an option 'name'"),
        (WrongDefault, "WrongDefault() fails"),
        (NotData, "NotData() fails"),
        (Infinite, "Infinite() fails"),
        (dict, "a subclass of pydantic.BaseModel"),
        (FakeConfig(), "a subclass of pydantic.BaseModel"),
        (None, "a subclass of pydantic.BaseModel"),
    ],
)
def test_options_models_are_checked_when_registered(model: Any, cause: str) -> None:
    error = only_error(acme=selector_plugin("acme", config=model))
    assert cause in str(error) and "'acme'" in str(error)
    assert error.plugin == "acme"


@pytest.mark.parametrize(
    ("plugin", "cause"),
    [
        (selector_plugin("acme", factory=None), "factory(config)"),  # type: ignore[arg-type]
        (selector_plugin("acme", factory=lambda: None), "factory(config)"),
        (detector_plugin("acme", factory=lambda config: None), "factory(config, tokenizer)"),
        (selector_plugin("two words"), "unusable name"),
        (selector_plugin(""), "unusable name"),
        (selector_plugin(None), "unusable name"),  # type: ignore[arg-type]
    ],
)
def test_names_and_factories_are_checked_when_registered(plugin: object, cause: str) -> None:
    assert cause in str(only_error(acme=plugin))


def test_a_name_taken_by_another_plugin_names_both_owners() -> None:
    registry, (error,) = load_only(first=selector_plugin("same"), second=selector_plugin("same"))
    assert "'first'" in str(error) and "'second'" in str(error) and "'same'" in str(error)
    assert error.plugin == "second"
    assert registry.selectors["same"].owner.plugin == "first"
    # A detector and a selector may share a name, as the built-in `random` does.
    registry, errors = load_only(first=selector_plugin("same"), second=detector_plugin("same"))
    assert errors == [] and "same" in registry.detectors and "same" in registry.selectors


def test_a_plugin_with_one_bad_registration_registers_nothing() -> None:
    class HalfGood:
        @hookimpl
        def sfi_register_boundary_detectors(self, register: Callable[..., Any]) -> None:
            register("good", FakeConfig, FakeDetector)

        @hookimpl
        def sfi_register_selectors(self, register: Callable[..., Any]) -> None:
            register("good", FakeConfig, FakeSelector)
            register("good", FakeConfig, FakeSelector)

    registry, (error,) = load_only(acme=HalfGood())
    assert "a second time" in str(error)
    assert not registry.detectors and not registry.selectors


def test_an_unhashable_plugin_is_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        @hookimpl
        def sfi_register_selectors(self, register: Callable[..., Any]) -> None: ...

    assert "unhashable" in str(only_error(acme=Unhashable()))


# ---------------------------------------------------------------- building


def test_builders_take_mappings_and_entries() -> None:
    plugins = {"one": detector_plugin("watcher"), "two": selector_plugin("chooser")}
    tokenizer: Any = object()
    with temporary_plugins(**plugins):
        config = SessionConfig(
            boundaries=[{"name": "watcher", "strength": 0.25}], selector={"name": "chooser"}
        )
        detectors = [
            build_detector(config.boundaries[0], tokenizer),
            build_detector({"name": "watcher", "strength": 0.25}, tokenizer),
        ]
        for detector in detectors:
            assert isinstance(detector, FakeDetector)
            assert detector.tokenizer is tokenizer
            assert detector.config == FakeConfig(strength=0.25)
        selector = build_selector(config.selector)
        assert isinstance(selector, FakeSelector) and selector.config == FakeConfig()
        with pytest.raises(ConfigError, match="chooser.strngth: unknown key"):
            build_selector({"name": "chooser", "strngth": 1})
        with pytest.raises(ConfigError, match=r"chooser \(in memory\)"):
            build_selector({"name": "choser"})
        with pytest.raises(ConfigError, match="Write {name: watcher}"):
            build_detector("watcher", None)  # type: ignore[arg-type]


def test_a_seed_that_is_not_given_is_the_default_seed() -> None:
    plugins = {
        "one": detector_plugin("watcher", config=SeededConfig),
        "two": selector_plugin("chooser", config=SeededConfig),
        "three": selector_plugin("unseeded"),
    }
    with temporary_plugins(**plugins):
        cases: list[tuple[dict[str, Any], int]] = [
            ({}, 7),
            ({"seed": None}, 7),
            ({"seed": 3}, 3),
            ({"seed": 0}, 0),
        ]
        for given, expected in cases:
            selector: Any = build_selector({"name": "chooser", **given}, default_seed=7)
            detector: Any = build_detector({"name": "watcher", **given}, None, default_seed=7)
            assert selector.config.seed == detector.config.seed == expected
        assert build_selector({"name": "unseeded"}, default_seed=7)


@pytest.mark.parametrize(
    ("factory", "cause"),
    [
        (lambda config: None, "NoneType without the method select"),
        (lambda config: FakeDetector(config), "FakeDetector without the method select"),
        (lambda config: 1 / 0, "ZeroDivisionError"),
        (lambda config: with_needs({"key_norm"}), "needs = {'key_norm'}"),
        (lambda config: with_needs(["key_norms"]), "needs = ['key_norms']"),
        (lambda config: with_needs(None), "needs = None"),
    ],
)
def test_what_a_factory_returns_is_checked(factory: Callable[..., Any], cause: str) -> None:
    with temporary_plugins(acme=selector_plugin("chooser", factory=factory)):
        with pytest.raises(PluginError) as caught:
            build_selector({"name": "chooser"})
    assert cause in str(caught.value)
    assert caught.value.plugin == "acme" and caught.value.distribution == "in memory"


def with_needs(needs: Any) -> FakeSelector:
    """A selector with these needs."""
    selector = FakeSelector(None)
    selector.needs = needs
    return selector


def test_a_detector_without_a_method_or_needs_is_refused() -> None:
    class Half:
        needs = frozenset({"text"})

        def __init__(self, config: object, tokenizer: object) -> None: ...
        def reset(self, prompt_ids: object, prompt_text: str) -> None: ...

    class NoNeeds(FakeDetector):
        needs = property(lambda self: self.missing)

    plugins = {
        "one": detector_plugin("half", factory=Half),
        "two": detector_plugin("no_needs", factory=NoNeeds),
    }
    with temporary_plugins(**plugins):
        with pytest.raises(PluginError, match="after_step, after_token, snapshot, restore"):
            build_detector({"name": "half"}, None)
        with pytest.raises(PluginError, match="without readable needs .AttributeError"):
            build_detector({"name": "no_needs"}, None)


def test_typed_errors_of_a_factory_pass_through() -> None:
    def refuse(config: object, tokenizer: object) -> None:
        raise ConfigError("this detector needs a tokenizer")

    with temporary_plugins(acme=detector_plugin("watcher", factory=refuse)):
        with pytest.raises(ConfigError, match="needs a tokenizer"):
            build_detector({"name": "watcher"}, None)


def test_validators_of_an_options_model_speak_for_themselves() -> None:
    class Picky(Settings):
        number: int = 1

        @field_validator("number")
        @classmethod
        def _is_odd(cls, value: int) -> int:
            if value % 2 == 0:
                raise ValueError("must be odd.")
            return value

    with temporary_plugins(acme=selector_plugin("picky", config=Picky)):
        with pytest.raises(ConfigError, match="selector.picky.number: must be odd"):
            SessionConfig(selector={"name": "picky", "number": 2})


@pytest.mark.parametrize("name", sorted(BUILT_IN_SELECTORS))
def test_every_built_in_selector_can_be_built(name: str) -> None:
    assert build_selector({"name": name}, default_seed=3).needs <= {"key_norms"}
