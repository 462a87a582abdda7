"""The public surface: which names there are, where they say they live, and what importing costs."""

from __future__ import annotations

import importlib
import inspect
import pickle
import typing
from collections.abc import Callable

import pytest
from pydantic import TypeAdapter

import sfi_agent
from sfi_agent import errors

EXPECTED = {
    "Boundary",
    "BoundaryDetector",
    "Engine",
    "EventStream",
    "Evidence",
    "FastAttention",
    "Instruments",
    "Mark",
    "McpTools",
    "Overflow",
    "ParkingLimits",
    "Ranking",
    "ReasoningDelta",
    "Reply",
    "SaveReport",
    "Selection",
    "Selector",
    "Session",
    "SessionConfig",
    "SessionStats",
    "Settings",
    "Step",
    "StepEvent",
    "StepRecord",
    "Telemetry",
    "TemplateReport",
    "TextDelta",
    "TokenEvent",
    "Tool",
    "ToolAnnotations",
    "ToolCall",
    "ToolResult",
    "ToolStart",
    "TurnEnd",
    "Usage",
    "WarmUpReport",
    "build_detector",
    "build_selector",
    "drop_oldest_turns",
    "event_to_json",
    "hookimpl",
    "load_plugins",
} | (set(errors.__all__) - {"explain"})

FOR_PLUGIN_AUTHORS = {
    "hookimpl",
    "Boundary",
    "TokenEvent",
    "StepEvent",
    "Evidence",
    "Ranking",
    "Selection",
    "BoundaryDetector",
    "Selector",
}


def test_the_list_of_public_names() -> None:
    assert sfi_agent.__all__ == sorted(sfi_agent.__all__)
    assert set(sfi_agent.__all__) == EXPECTED
    assert FOR_PLUGIN_AUTHORS <= EXPECTED
    assert set(sfi_agent.__all__) <= set(dir(sfi_agent))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(sfi_agent, name)
    assert getattr(sfi_agent, name) is value
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        _ = sfi_agent.Sesion


def public_classes() -> list[type]:
    values = (getattr(sfi_agent, name) for name in sfi_agent.__all__)
    return [value for value in values if inspect.isclass(value)]


def test_public_objects_say_that_they_live_here() -> None:
    for name in sfi_agent.__all__:
        value = getattr(sfi_agent, name)
        if name == "hookimpl":  # an instance; its module is that of its class
            continue
        if inspect.isclass(value) and vars(value).get("__annotations__"):
            # Their annotations are read with the names of the module they were written in.
            assert value.__module__.startswith("sfi_agent."), name
            continue
        assert value.__module__ == "sfi_agent", name


def test_the_public_home_breaks_neither_pickling_nor_annotations() -> None:
    for kind in public_classes():
        assert pickle.loads(pickle.dumps(kind)) is kind
    assert pickle.loads(pickle.dumps(sfi_agent.ConfigError("x"))).args == ("x",)
    boundary = sfi_agent.Boundary("because", "next")
    assert pickle.loads(pickle.dumps(boundary)) == boundary
    assert set(typing.get_type_hints(sfi_agent.Boundary)) == {"reason", "when"}
    assert TypeAdapter(sfi_agent.Boundary).validate_python({"reason": "x"}).when == "next"

    class Stricter(sfi_agent.SessionConfig):
        pass

    assert Stricter().memory.sink_tokens == 4


def test_errors_form_one_tree() -> None:
    for name in set(errors.__all__) - {"explain"}:
        kind = getattr(sfi_agent, name)
        assert issubclass(kind, sfi_agent.SfiError)
        assert name in (errors.__doc__ or "")
    assert issubclass(sfi_agent.ConfigError, ValueError)


def test_importing_imports_neither_torch_nor_transformers(
    child_python: Callable[..., str],
) -> None:
    program = """
        import sys
        import sfi_agent
        from sfi_agent import SessionConfig, hookimpl, build_selector, build_detector
        import sfi_agent.hookspecs, sfi_agent.testing
        import sfi_policies, sfi_selectors
        SessionConfig()
        heavy = {"torch", "transformers", "tokenizers", "spacy", "numpy", "rich", "typer"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert child_python(program) == "[]"


def test_star_import_gives_the_public_names(child_python: Callable[..., str]) -> None:
    program = "from sfi_agent import *; import sfi_agent; print(set(sfi_agent.__all__) <= {*dir()})"
    assert child_python(program) == "True"


def test_lazy_names_are_declared_for_type_checkers_too() -> None:
    for name, module in sfi_agent._RESOLVED_ON_FIRST_USE.items():
        assert name in sfi_agent.__all__
        assert getattr(importlib.import_module(module), name) is getattr(sfi_agent, name)
    source = inspect.getsource(sfi_agent)
    declared = source[source.index("if TYPE_CHECKING:") : source.index("__all__ = [")]
    for name in sfi_agent._RESOLVED_ON_FIRST_USE:
        assert name in declared
