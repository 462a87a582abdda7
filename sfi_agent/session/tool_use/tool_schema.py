"""How functions become tools: names, descriptions and schemas, read once and checked."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from sfi_agent.errors import ToolDefinitionError, explain
from sfi_agent.session.tool_use.schema_shape import schema_problem
from sfi_agent.session.tool_use.signature_schema import (
    HintProblem,
    parameters_of_signature,
    with_constraints,
)

__all__ = ["Tool", "ToolEntry", "describe_tool", "is_async"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_EXAMPLE = (
    'Write it like this: def search(query: str, limit: int = 5) -> str: """Search the notes.'
    ' Args: query: What to look for. limit: How many notes to return.""" with \'Args:\' and each'
    " argument on lines of their own"
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool of which something is given instead of read from the function.

    Attributes:
        function: What runs, sync or async; it gets the arguments by name.
        name: What the model calls it; None takes the function's name.
        description: What it does, for the model; None takes the docstring's.
        parameters: JSON schema of the arguments (`{"type": "object", "properties": ...}`); None
            reads it from type hints and docstring.
        timeout_seconds: Time a call may take, `float("inf")` for any; None takes the session's
            `tools.timeout_seconds`.
        parallel: Whether calls may run beside the other calls of their turn. Calls that may not
            wait for those before them, and those behind them wait for them.
    """

    function: Callable[..., Any]
    name: str | None = None
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    timeout_seconds: float | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ToolEntry:
    """A tool as a session keeps it.

    Attributes:
        name: What the model calls it.
        tool: What was given.
        schema: As chat templates take it.
    """

    name: str
    tool: Tool
    schema: dict[str, Any]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine, as far as can be told without calling it."""
    while isinstance(function, functools.partial):
        function = function.func
    called = function if inspect.isroutine(function) else getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def describe_tool(tool: Tool) -> ToolEntry:
    """Read what the model is told about a tool.

    Raises:
        ToolDefinitionError: It cannot be described or called.
    """
    function = tool.function
    if not callable(function):
        raise _definition_error(repr(function), "it is not callable", "Give a function or a Tool")
    base, bound = _unwrap(function)
    name = tool.name if tool.name is not None else getattr(base, "__name__", "")
    shown = name or repr(function)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _definition_error(
            shown,
            f"{name!r} is no usable name",
            'Give one with Tool(function, name="..."): letters, digits, _ and -, at most 64',
        )
    _require_plain_call(shown, base)
    _require_conduct(shown, tool)
    explicit = tool.parameters is not None
    if not explicit and not (inspect.isfunction(base) or inspect.ismethod(base)):
        raise _definition_error(
            shown,
            f"{type(base).__name__} objects carry no type hints and docstring to read",
            "Give a function, or Tool(function, name=..., description=..., parameters=...)",
        )
    described = _explicit_schema(shown, tool, base) if explicit else _read_schema(shown, tool, base)
    described["name"] = name
    if tool.description is not None:
        described["description"] = tool.description
    _hide_bound(described["parameters"], bound)
    return ToolEntry(name, tool, {"type": "function", "function": described})


def _unwrap(function: Callable[..., Any]) -> tuple[Callable[..., Any], frozenset[str]]:
    """The function under a chain of partials, and the names of the arguments they bind."""
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        try:
            given = inspect.signature(function.func).bind_partial(
                *function.args, **function.keywords
            )
        except (TypeError, ValueError) as error:
            raise _definition_error(repr(function), str(error), "Correct the partial") from error
        if function.args:
            raise _definition_error(
                repr(function),
                "a partial that binds arguments by position",
                "Bind them by name: functools.partial(function, argument=value)",
            )
        bound.update(given.arguments)
        function = function.func
    return function, frozenset(bound)


def _require_plain_call(name: str, base: Callable[..., Any]) -> None:
    called = base if inspect.isroutine(base) else getattr(base, "__call__", base)  # noqa: B004
    if inspect.isasyncgenfunction(called):
        raise _definition_error(
            name, "it is an async generator", "Give a function that returns its whole result"
        )
    if inspect.isgeneratorfunction(called):
        raise _definition_error(
            name, "it is a generator", "Give a function that returns its whole result"
        )
    try:
        parameters = inspect.signature(base).parameters.values()
    except (TypeError, ValueError):
        return
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            remedy = "Remove the / from the signature: arguments are passed by name"
            raise _definition_error(name, f"argument {parameter.name} is positional-only", remedy)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            remedy = "Name every argument, so that the model can be told about it"
            raise _definition_error(name, f"it takes *{parameter.name}", remedy)
        if isinstance(parameter.default, FieldInfo):
            remedy = "Write Annotated[type, Field(...)] = value, so that a call without it works"
            raise _definition_error(
                name, f"{parameter.name} has a pydantic Field for its default", remedy
            )


def _require_conduct(name: str, tool: Tool) -> None:
    limit = tool.timeout_seconds
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if limit is not None and not (number and limit > 0):
        raise _definition_error(name, f"timeout_seconds={limit!r}", "Give a number above 0")
    if not isinstance(tool.parallel, bool):
        raise _definition_error(name, f"parallel={tool.parallel!r}", "Give True or False")


def _read_schema(name: str, tool: Tool, base: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        described: dict[str, Any] = get_json_schema(base)["function"]
        described["parameters"] = with_constraints(base, described["parameters"])
    except Exception as error:
        # Hints that name unknown types raise NameError, broken "(choices: ...)" a JSON error.
        try:
            parameters = parameters_of_signature(base)
        except HintProblem as problem:
            raise _definition_error(name, str(problem), _EXAMPLE) from error
        except ValueError:
            raise _definition_error(name, f"{type(error).__name__}: {error}", _EXAMPLE) from error
        text = (inspect.getdoc(base) or "").partition("Args:")[0].strip()
        described = {"description": text, "parameters": parameters}
    if not (tool.description or described.get("description")):
        raise _definition_error(name, "its docstring says nothing before Args:", _EXAMPLE)
    # A method without its object lacks an argument that no model is told about.
    _require_fitting_signature(name, base, described["parameters"])
    return described


def _explicit_schema(name: str, tool: Tool, base: Callable[..., Any]) -> dict[str, Any]:
    assert tool.parameters is not None
    description = tool.description or (inspect.getdoc(base) if inspect.isroutine(base) else None)
    if not description:
        raise _definition_error(name, "no description", "Give Tool(..., description='...')")
    try:
        # Keys sorted: schemas that reach us over a network come in any order.
        text = json.dumps(dict(tool.parameters), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _definition_error(name, f"parameters: {error}", "Give plain JSON data") from error
    parameters = json.loads(text)
    if parameters.get("type") != "object" or not isinstance(parameters.get("properties"), dict):
        raise _definition_error(
            name,
            f"parameters={parameters!r}",
            'Give {"type": "object", "properties": {...}, "required": [...]}',
        )
    if problem := schema_problem(parameters):
        raise _definition_error(name, problem, "Give a JSON schema")
    _require_fitting_signature(name, tool.function, parameters)
    return {"name": name, "description": description, "parameters": parameters}


def _require_fitting_signature(
    name: str, function: Callable[..., Any], parameters: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**dict.fromkeys(parameters["properties"]))
    except TypeError as error:
        raise _definition_error(
            name, f"parameters that the function does not take: {error}", "Make them agree"
        ) from error


def _hide_bound(parameters: dict[str, Any], bound: frozenset[str]) -> None:
    for name in bound:
        parameters["properties"].pop(name, None)
    if "required" in parameters:
        parameters["required"] = [item for item in parameters["required"] if item not in bound]
        if not parameters["required"]:
            del parameters["required"]


def _definition_error(name: str, problem: str, remedy: str) -> ToolDefinitionError:
    return ToolDefinitionError(explain(f"Describe the tool {name}", got=problem, remedy=remedy))
