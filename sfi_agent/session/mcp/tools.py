"""Tools of an MCP server as tools of a session."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, TextIO

from sfi_agent.errors import InputError, ToolServerError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.mcp.client import ToolChanges, checked_server, client_plan
from sfi_agent.session.mcp.connection import Connection
from sfi_agent.session.mcp.offer import Choice, Offer, ToolAnnotations, make_offer
from sfi_agent.session.tool_use.tools import Tool

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["McpTools"]


class McpTools:
    """A connection to an MCP server, and its tools for `engine.session(tools=...)`.

    It is new until `open()` or `with`, then open, then closed. The list of tools is read once and
    stays as it is. The tools are async functions that any event loop may call; in a session, what
    goes wrong in a call is a tool result that the model reads. Tools that do not say that they are
    read-only run one after the other, in the order of the calls.

    Args:
        server: A command line (`["uvx", "mcp-server-git"]`), `StdioServerParameters`, the URL of a
            streamable HTTP server, an `MCPServer` in this process, or a transport of the mcp
            package.
        prefix: Put before every tool's name, so that the tools of two servers do not clash.
        rename: Names for single tools, by the server's name; the prefix is not put before these.
        include: The server's names of the tools to offer; None offers all.
        exclude: The server's names of tools to leave out.
        connect_timeout_seconds: How long starting the server and listing its tools may take.
        call_timeout_seconds: `Tool.timeout_seconds` of the tools: how long a call may take. None
            takes the session's `tools.timeout_seconds`.
        errlog: Where a server process writes its stderr; None keeps the last lines, which are
            quoted when it cannot be started.

    Raises:
        MissingExtraError: The extra `mcp` is not installed.
        InputError: An argument is not usable.
    """

    def __init__(
        self,
        server: Any,
        *,
        prefix: str = "",
        rename: Mapping[str, str] | None = None,
        include: Collection[str] | None = None,
        exclude: Collection[str] = (),
        connect_timeout_seconds: float = 30.0,
        call_timeout_seconds: float | None = None,
        errlog: TextIO | None = None,
    ) -> None:
        checked, self.name = checked_server(server)
        if not isinstance(prefix, str):
            raise InputError(explain("Gave prefix", got=repr(prefix), allowed="a string"))
        self._choice = Choice(
            self.name,
            prefix,
            dict(rename or {}),
            None if include is None else _names("include", include),
            _names("exclude", exclude),
            None
            if call_timeout_seconds is None
            else _seconds("call_timeout_seconds", call_timeout_seconds),
        )
        self._connect_seconds = _seconds("connect_timeout_seconds", connect_timeout_seconds)
        self._changes = ToolChanges(self.name)
        self._connection = Connection(client_plan(checked, errlog, self._changes, self.name))
        self._status: Literal["new", "open", "closed"] = "new"
        self._offer: Offer | None = None

    @property
    def status(self) -> Literal["new", "open", "closed"]:
        """Whether the connection is new, open or closed."""
        return self._status

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The tools, sorted by name, as they were when the connection was opened.

        Raises:
            ToolServerError: It was never opened.
        """
        return self._opened().tools

    @property
    def annotations(self) -> Mapping[str, ToolAnnotations]:
        """What the server says about each tool, by the name that the model sees.

        Raises:
            ToolServerError: The connection was never opened.
        """
        return self._opened().annotations

    @property
    def instructions(self) -> str | None:
        """What the server wants a model to know, for a system prompt; None where it says nothing.

        Raises:
            ToolServerError: The connection was never opened.
        """
        return self._opened().instructions

    @property
    def changed(self) -> bool:
        """Whether the server has said since then that its tools are others now.

        Sessions and `tools` stay as they are; connect again to use what changed.
        """
        return self._changes.seen

    def open(self) -> Self:
        """Start the server or connect to it, and read its tools; opening twice is fine.

        Raises:
            ToolServerError: It cannot be started or reached in time, its tools cannot be used as
                asked, or the connection was closed before.
        """
        if self._status == "open":
            return self
        if self._status == "closed":
            got = "a connection that was closed"
            remedy = "Make another McpTools"
            raise ToolServerError(explain(f"Connect to {self.name}", got=got, remedy=remedy))
        self._status = "closed"
        started = time.perf_counter()
        client, listed = self._connection.open(self._connect_seconds)
        try:
            self._offer = make_offer(self._choice, self._connection, client, listed)
        except BaseException:
            self._connection.close()
            raise
        self._status = "open"
        log_event(
            "info",
            "tool_server_opened",
            server=self.name,
            tools=len(self._offer.tools),
            protocol=client.protocol_version,
            seconds=round(time.perf_counter() - started, 6),
        )
        return self

    def close(self) -> None:
        """End the connection, and the server if it was started here; closing twice is fine.

        Calls that are under way end with an error.

        Raises:
            ToolServerError: A tool of an `MCPServer` in this process runs on and cannot be stopped.
        """
        self._status = "closed"
        self._connection.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        try:
            return await asyncio.to_thread(self.open)
        except asyncio.CancelledError:
            self._connection.end()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        count = f", {len(self._offer.tools)} tools" if self._offer else ""
        return f"McpTools({self.name!r}, {self._status}{count})"

    def _opened(self) -> Offer:
        if self._offer is None:
            remedy = "Use it as `with McpTools(...) as server`, or call open()"
            raise ToolServerError(
                explain(f"Use the tools of {self.name}", got="no connection", remedy=remedy)
            )
        return self._offer


def _names(argument: str, given: Collection[str]) -> frozenset[str]:
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        allowed = "a collection of tool names"
        raise InputError(explain(f"Gave {argument}", got=repr(given), allowed=allowed))
    return frozenset(given)


def _seconds(argument: str, given: Any) -> float:
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not number or not 0 < given < math.inf:
        allowed = "a number of seconds above 0"
        raise InputError(explain(f"Gave {argument}", got=repr(given), allowed=allowed))
    return float(given)
