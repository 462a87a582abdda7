"""The tools of a session: what the model may call, and what a call and its result look like."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from sfi_agent.errors import InputError, ToolDefinitionError, explain
from sfi_agent.session.asynchronous.worker_loop import wait_elsewhere
from sfi_agent.session.events import ToolCall, ToolResult
from sfi_agent.session.tool_use.call_arguments import validate_arguments
from sfi_agent.session.tool_use.tool_schema import Tool, ToolEntry, describe_tool

__all__ = ["PreparedCall", "Tool", "ToolSet", "failed_call"]


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call that can be run.

    Attributes:
        call: What the model wrote.
        tool: What runs.
        arguments: By name, checked against the schema.
    """

    call: ToolCall
    tool: Tool
    arguments: Mapping[str, Any]

    def start(self) -> ToolResult | Awaitable[Any]:
        """Call the function; what it gives back may have to be awaited first."""
        value = self.tool.function(**self.arguments)
        return value if inspect.isawaitable(value) else self.gave(value)

    def gave(self, value: Any) -> ToolResult:
        """The result for a value that the function gave."""
        try:
            return ToolResult(self.call.id, self.call.name, _as_text(value))
        except Exception as error:
            return self.raised(error)

    def raised(self, error: BaseException) -> ToolResult:
        """The result for an exception: whatever a tool raises belongs to the conversation."""
        return failed_call(self.call, f"{self.call.name} failed: {_described(error)}")


class ToolSet:
    """The tools of one session: described once, sorted by name, fixed from then on.

    The order and text of the schemas are part of every prompt, hence never change.

    Args:
        tools: Functions, sync or async, with type hints and a Google-style docstring, bound
            methods, `functools.partial`s of such functions (bound arguments are not shown to the
            model), or `Tool`s.

    Attributes:
        can_run: Whether there are functions behind the schemas, see `of_schemas`.

    Raises:
        ToolDefinitionError: A tool cannot be described or called, or a name is taken twice.
    """

    def __init__(self, tools: Sequence[Callable[..., Any] | Tool] = ()) -> None:
        entries: dict[str, ToolEntry] = {}
        if not isinstance(tools, Iterable) or isinstance(tools, (str, bytes)):
            raise ToolDefinitionError(
                explain(
                    "Give tools",
                    got=repr(tools),
                    allowed="a list of functions and Tools",
                    remedy="Put a single one into a list; leave tools out where there are none",
                )
            )
        for given in tools:
            entry = describe_tool(given if isinstance(given, Tool) else Tool(given))
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
        self.can_run = True

    @classmethod
    def of_schemas(cls, schemas: Sequence[dict[str, Any]]) -> ToolSet:
        """Tools of which only the schemas are known: models can be shown them, nobody can run
        them, and `can_run` is false unless there are none."""
        made = cls()
        for schema in schemas:
            name = schema["function"]["name"]
            made._entries[name] = ToolEntry(name, Tool(_unknown_function, name), deepcopy(schema))
        made.can_run = not schemas
        return made

    def require_functions(self, action: str) -> None:
        """Refuse to run tools of which only the schemas are known.

        Raises:
            InputError: There are no functions.
        """
        if not self.can_run:
            raise InputError(
                explain(
                    f"called session.{action}() on a session loaded without its tools",
                    got=f"schemas of {', '.join(self.names)}, and no functions",
                    remedy="pass tools=[...] to engine.load_session, or call session.send and run "
                    "the calls yourself",
                )
            )

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

    def prepare(self, call: ToolCall) -> PreparedCall | ToolResult:
        """The call, ready to run, or the result that says why it cannot be run."""
        if call.error is not None:
            return failed_call(call, f"The tool call could not be read: {call.error}")
        entry = self._entries.get(call.name)
        if entry is None:
            known = ", ".join(self.names) or "none, this conversation has no tools"
            return failed_call(call, f"There is no tool {call.name!r}. Known tools: {known}.")
        schema = entry.schema["function"]["parameters"]
        arguments, problems = validate_arguments(entry.tool.function, schema, call.arguments)
        if problems:
            return failed_call(call, f"{entry.name} was not run. {' '.join(problems)}")
        return PreparedCall(call, entry.tool, arguments)

    def run(self, call: ToolCall) -> ToolResult:
        """Run one call in this thread. What goes wrong is a result the model can act on.

        The exceptions are those that are not errors of the tool: KeyboardInterrupt, SystemExit.
        """
        prepared = self.prepare(call)
        if isinstance(prepared, ToolResult):
            return prepared
        try:
            started = prepared.start()
            if isinstance(started, ToolResult):
                return started
            return prepared.gave(wait_elsewhere(started))
        except (Exception, asyncio.CancelledError) as error:
            return prepared.raised(error)


def failed_call(call: ToolCall, message: str) -> ToolResult:
    """The result of a call that did not do what it was meant to."""
    return ToolResult(call.id, call.name, _printable(message), is_error=True)


def _unknown_function(**arguments: Any) -> str:
    raise NotImplementedError("the session was loaded without the functions of its tools")


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


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
