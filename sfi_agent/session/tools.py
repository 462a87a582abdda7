"""Tools of a session: plain functions the model may call, their schemas, and running them."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from sfi_agent.errors import ToolDefinitionError, explain
from sfi_agent.session.events import ToolCall, ToolResult
from sfi_agent.session.json_schema import check_arguments

__all__ = ["Tool", "ToolSet"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_EXAMPLE = (
    'Write it like this: def search(query: str, limit: int = 5) -> str: """Search the notes.'
    ' Args: query: What to look for. limit: How many notes to return.""" with \'Args:\' and each'
    " argument on lines of their own"
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool whose description is given instead of read from the function.

    Attributes:
        function: What runs; it gets the arguments by name.
        name: What the model calls it; None takes the function's name.
        description: What it does, for the model; None takes the docstring's.
        parameters: JSON schema of the arguments (`{"type": "object", "properties": ...}`); None
            reads it from type hints and docstring.
    """

    function: Callable[..., Any]
    name: str | None = None
    description: str | None = None
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]


class ToolSet:
    """The tools of one session: described once, sorted by name, fixed from then on.

    The order and text of the schemas are part of every prompt, hence never change.

    Args:
        tools: Functions with type hints and a Google-style docstring, bound methods,
            `functools.partial`s of such functions (bound arguments are not shown to the model),
            or `Tool`s.

    Raises:
        ToolDefinitionError: A tool cannot be described or called, or a name is taken twice.
    """

    def __init__(self, tools: Sequence[Callable[..., Any] | Tool] = ()) -> None:
        entries: dict[str, _Entry] = {}
        for given in tools:
            entry = _describe(given if isinstance(given, Tool) else Tool(given))
            if entry.name in entries:
                raise ToolDefinitionError(
                    explain(
                        "Give two tools the same name",
                        got=repr(entry.name),
                        allowed="one tool per name",
                        remedy='Rename one with Tool(function, name="...")',
                    )
                )
            entries[entry.name] = entry
        self._entries = {name: entries[name] for name in sorted(entries)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order the model sees."""
        return tuple(self._entries)

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """Schemas as chat templates take them (copies), sorted by name."""
        return tuple(deepcopy(entry.schema) for entry in self._entries.values())

    @property
    def canonical_json(self) -> tuple[str, ...]:
        """One line of JSON per tool, keys sorted: equal if and only if the schemas are."""
        return tuple(
            json.dumps(entry.schema, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
            for entry in self._entries.values()
        )

    def __len__(self) -> int:
        return len(self._entries)

    def run(self, call: ToolCall) -> ToolResult:
        """Run one call. What goes wrong is a result the model can act on, never an exception.

        The exceptions are those that are not errors of the tool: KeyboardInterrupt, SystemExit.
        """
        if call.error is not None:
            return _failed(call, f"The tool call could not be read: {call.error}")
        entry = self._entries.get(call.name)
        if entry is None:
            known = ", ".join(self.names) or "none, this conversation has no tools"
            return _failed(call, f"There is no tool {call.name!r}. Known tools: {known}.")
        arguments, problems = check_arguments(
            call.arguments, entry.schema["function"]["parameters"]
        )
        if problems:
            return _failed(call, f"{entry.name} was not run. {' '.join(problems)}")
        try:
            value = entry.function(**arguments)
            if inspect.isawaitable(value):
                _close(value)
                return _failed(call, f"{entry.name} returned an awaitable, which is not supported.")
            content = _as_text(value)
        except Exception as error:
            # Whatever a tool raises belongs to the conversation, not to the program.
            return _failed(call, f"{entry.name} failed: {type(error).__name__}: {error}")
        return ToolResult(call.id, call.name, content)


def _failed(call: ToolCall, message: str) -> ToolResult:
    return ToolResult(call.id, call.name, _printable(message), is_error=True)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return _printable(value)
    try:
        return _printable(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return _printable(str(value))


def _printable(text: str) -> str:
    # Lone surrogates (from undecodable file names) are no text and stop every tokenizer.
    return text.encode("utf-8", "replace").decode("utf-8")


def _close(awaitable: Any) -> None:
    if inspect.iscoroutine(awaitable):
        awaitable.close()


def _describe(tool: Tool) -> _Entry:
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
    return _Entry(name, function, {"type": "function", "function": described})


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
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise _definition_error(
            name,
            "it is a coroutine function",
            "Coroutines are not supported yet; give a function that waits by itself",
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


def _read_schema(name: str, tool: Tool, base: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema = get_json_schema(base)
    except Exception as error:
        # Hints that name unknown types raise NameError, broken "(choices: ...)" a JSON error.
        raise _definition_error(name, f"{type(error).__name__}: {error}", _EXAMPLE) from error
    described: dict[str, Any] = schema["function"]
    if not (tool.description or described.get("description")):
        raise _definition_error(name, "its docstring says nothing before Args:", _EXAMPLE)
    return described


def _explicit_schema(name: str, tool: Tool, base: Callable[..., Any]) -> dict[str, Any]:
    assert tool.parameters is not None
    description = tool.description or (inspect.getdoc(base) if inspect.isroutine(base) else None)
    if not description:
        raise _definition_error(name, "no description", "Give Tool(..., description='...')")
    try:
        # Keys sorted: schemas that reach us over a network come in any order.
        parameters = json.loads(json.dumps(dict(tool.parameters), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise _definition_error(name, f"parameters: {error}", "Give plain JSON data") from error
    if parameters.get("type") != "object" or not isinstance(parameters.get("properties"), dict):
        raise _definition_error(
            name,
            f"parameters={parameters!r}",
            'Give {"type": "object", "properties": {...}, "required": [...]}',
        )
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
