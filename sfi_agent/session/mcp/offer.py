"""What one MCP server offers a session: the tools chosen, their names, and how they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sfi_agent.errors import SfiError, ToolServerError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.mcp.connection import Connection, reason_of
from sfi_agent.session.mcp.results import result_text
from sfi_agent.session.mcp.schemas import canonical_parameters
from sfi_agent.session.tool_use.tools import Tool, ToolSet

__all__ = ["Choice", "Offer", "ToolAnnotations", "make_offer"]


@dataclass(frozen=True, slots=True)
class ToolAnnotations:
    """What a server says about a tool: hints, true only as far as the server is trusted.

    Where it says nothing the values are those that the protocol prescribes.

    Attributes:
        title: Name for people; None where there is none.
        read_only: It changes nothing.
        destructive: It may delete or overwrite; without meaning where it is read-only.
        idempotent: Calling it again with the same arguments changes nothing more.
        open_world: It reaches beyond what its server holds, as a web search does.
    """

    title: str | None = None
    read_only: bool = False
    destructive: bool = True
    idempotent: bool = False
    open_world: bool = True


@dataclass(frozen=True, slots=True)
class Offer:
    """What stays as it is for the life of a connection.

    Attributes:
        tools: Sorted by name.
        annotations: By the name that the model sees.
        instructions: For a system prompt; None where the server gives none.
    """

    tools: tuple[Tool, ...]
    annotations: Mapping[str, ToolAnnotations]
    instructions: str | None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools of a server are offered, under which names, and how long they may take.

    Attributes:
        server: Names the server in messages.
        prefix, rename, include, exclude, call_timeout_seconds: See `McpTools`.
    """

    server: str
    prefix: str
    rename: Mapping[str, str]
    include: frozenset[str] | None
    exclude: frozenset[str]
    call_timeout_seconds: float | None

    def of(self, listed: Sequence[Any]) -> list[tuple[str, Any]]:
        """The chosen tools with the names that the model sees."""
        known = {item.name for item in listed}
        asked = {*self.rename, *(self.include or ()), *self.exclude}
        if asked - known:
            raise ToolServerError(
                explain(
                    f"Choose tools of {self.server}",
                    got=", ".join(sorted(asked - known)),
                    allowed=", ".join(sorted(known)) or "none, it has no tools",
                )
            )
        return [
            (self.rename.get(item.name, self.prefix + item.name), item)
            for item in listed
            if item.name not in self.exclude and (self.include is None or item.name in self.include)
        ]

    def unusable(self, tool: str, problem: str) -> ToolServerError:
        """The error about a tool that cannot be offered."""
        remedy = f"Leave it out with exclude=[{tool!r}], or choose names with prefix or rename"
        return ToolServerError(
            explain(f"Use the tool {tool!r} of {self.server}", got=problem, remedy=remedy)
        )


def make_offer(choice: Choice, connection: Connection, client: Any, listed: Sequence[Any]) -> Offer:
    """The offer of an open client.

    Args:
        choice: Which of its tools, under which names.
        connection: What calls go through.
        client: For what the server says about itself.
        listed: All of its tools.

    Raises:
        ToolServerError: A tool is not usable or not there, or a name is taken twice.
    """
    tools: dict[str, Tool] = {}
    annotations: dict[str, ToolAnnotations] = {}
    for name, item in choice.of(listed):
        if name in tools:
            raise choice.unusable(item.name, f"a second tool named {name!r}")
        call = _RemoteTool(connection, choice, item.name)
        try:
            annotations[name] = _annotations(item)
            tools[name] = Tool(
                call,
                name,
                _description(item, choice.server),
                canonical_parameters(item.input_schema),
                timeout_seconds=choice.call_timeout_seconds,
                parallel=annotations[name].read_only,
            )
            ToolSet([tools[name]])  # What a session would refuse is refused now.
        except (ValueError, RecursionError) as error:
            raise choice.unusable(item.name, str(error)) from error
    ordered = sorted(tools)
    return Offer(
        tuple(tools[name] for name in ordered),
        MappingProxyType({name: annotations[name] for name in ordered}),
        client.instructions,
    )


class ToolFailure(Exception):
    """What a tool of a server reports as its error."""


class _RemoteTool:
    """One tool of a server, as an async function."""

    def __init__(self, connection: Connection, choice: Choice, name: str) -> None:
        self._connection, self._name = connection, name
        self._server = choice.server

    @property
    def __signature__(self) -> Any:
        # What it takes stands in the server's schema; its names need not be names in Python.
        raise ValueError("only the server knows the signature")

    async def __call__(self, /, **arguments: Any) -> str:
        async def call(client: Any) -> Any:
            return await client.call_tool(self._name, arguments)

        try:
            result = await self._connection.call(call)
            text = result_text(result)
        except SfiError:
            raise
        except Exception as error:
            got = self._explained(error)
            raise ToolServerError(explain(f"Call {self._name}", got=got)) from error
        if result.is_error:
            raise ToolFailure(text)
        return text

    def _explained(self, error: Exception) -> str:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        lost = isinstance(error, MCPError) and error.code == CONNECTION_CLOSED
        # Servers use the client's code for errors of their own.
        if lost and str(error) == "Connection closed":
            log_event("warning", "tool_server_lost", server=self._server, reason=str(error))
            return f"a lost connection to {self._server}"
        return reason_of(error)


def _description(item: Any, server: str) -> str:
    text: str = item.description or item.title or f"The tool {item.name} of {server}."
    # Lone surrogates are no text and stop every tokenizer.
    return text.encode("utf-8", "replace").decode("utf-8")


def _annotations(item: Any) -> ToolAnnotations:
    given = item.annotations
    if given is None:
        return ToolAnnotations(item.title)
    hints = {
        "read_only": given.read_only_hint,
        "destructive": given.destructive_hint,
        "idempotent": given.idempotent_hint,
        "open_world": given.open_world_hint,
    }
    said = {name: value for name, value in hints.items() if value is not None}
    return ToolAnnotations(item.title or given.title, **said)
