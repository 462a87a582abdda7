"""What is given for an MCP server, as a client of the mcp package."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from sfi_agent.errors import InputError, MissingExtraError, ToolServerError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.mcp.connection import ClientPlan, reason_of

__all__ = ["MAX_PAGES", "ToolChanges", "checked_server", "client_plan"]

MAX_PAGES = 1000
"""Pages of a tool list; a server that goes on for ever is refused."""

_KEPT_STDERR_BYTES = 2000
_STDERR_SECONDS = 0.5
_FORMS = (
    'a command line such as ["uvx", "mcp-server-git"], StdioServerParameters, a URL that begins'
    " with http:// or https://, an MCPServer, or a transport of the mcp package"
)


class ToolChanges:
    """Whether a server has said that its tools changed.

    Attributes:
        seen: It has.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self.seen = False

    async def note(self, message: object) -> None:
        """Look at one message of the server."""
        from mcp_types import ToolListChangedNotification

        if isinstance(message, ToolListChangedNotification):
            self.seen = True
            log_event("warning", "tool_list_changed", server=self._server)


def client_plan(server: Any, errlog: TextIO | None, changes: ToolChanges, name: str) -> ClientPlan:
    """How to connect to a server and read its tools.

    The result of `Connection.open` is the client with the list of its tools.
    """
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client

    tail = _StderrTail()

    @asynccontextmanager
    async def client() -> AsyncIterator[Any]:
        if not isinstance(server, StdioServerParameters):
            async with Client(server, message_handler=changes.note) as opened:
                yield opened
            return
        async with tail.file(errlog) as file:
            transport = stdio_client(server, errlog=file)
            async with Client(transport, message_handler=changes.note) as opened:
                yield opened

    async def prepare(opened: Any) -> tuple[Any, list[Any]]:
        return opened, await _all_tools(opened, name)

    async def watch(opened: Any) -> None:
        await _watch_changes(opened, name)

    return ClientPlan(name, client, prepare, watch, tail.text)


def checked_server(server: Any) -> tuple[Any, str]:
    """The server in a form that the client takes, and a name for messages.

    Raises:
        MissingExtraError: The mcp package is not installed.
        InputError: It is nothing that a client can connect to.
    """
    try:
        from mcp import StdioServerParameters
        from mcp.server import MCPServer, Server
    except ImportError as error:
        raise MissingExtraError("Use the tools of an MCP server", extra="mcp") from error
    if isinstance(server, str) and server.startswith(("http://", "https://")):
        place = urlsplit(server)
        # Without user, password and query: they may be secrets.
        return server, f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"
    if isinstance(server, list | tuple) and server and all(isinstance(p, str) for p in server):
        command, *arguments = server
        return StdioServerParameters(command=command, args=arguments), Path(command).name
    if isinstance(server, StdioServerParameters):
        return server, Path(server.command).name
    if isinstance(server, MCPServer | Server):
        return server, server.name
    if hasattr(type(server), "__aenter__"):
        return server, type(server).__name__
    raise InputError(explain("Use the tools of a server", got=repr(server), allowed=_FORMS))


async def _all_tools(client: Any, name: str) -> list[Any]:
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return tools
    raise ToolServerError(
        explain(f"List the tools of {name}", got=f"more than {MAX_PAGES} pages, {len(tools)} tools")
    )


async def _watch_changes(client: Any, name: str) -> None:
    """Ask to be told of changes, where servers must be asked; `ToolChanges` hears them."""
    from mcp.client.subscriptions import ListenNotSupportedError

    try:
        async with client.listen(tools_list_changed=True) as events:
            async for _ in events:
                pass
    except ListenNotSupportedError:
        return  # An older protocol, in which servers tell without being asked.
    except Exception as error:
        log_event("debug", "tool_changes_not_told", server=name, reason=reason_of(error))


class _StderrTail:
    """The last that a server process wrote to its stderr, for messages about its failure."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def text(self) -> str:
        """To be put behind a message; "" where it wrote nothing."""
        text = bytes(self._bytes).decode("utf-8", "replace").strip()
        return f"; its stderr ends: {text}" if text else ""

    @asynccontextmanager
    async def file(self, errlog: TextIO | None) -> AsyncIterator[TextIO]:
        """Where the process shall write: the file given, or a pipe whose last bytes are kept."""
        import anyio

        given = errlog if sys.platform != "win32" else errlog or sys.__stderr__
        if given is not None:  # The loops of Windows cannot read such pipes.
            yield given
            return
        read_end, write_end = os.pipe()
        with open(read_end, "rb", 0) as reader, open(write_end, "w") as writer:
            loop = asyncio.get_running_loop()
            pipe, keeper = await loop.connect_read_pipe(lambda: _Keeper(self._bytes), reader)
            try:
                yield writer
            finally:
                writer.close()
                # The process is gone. What it wrote is read, unless a child of it still writes.
                with anyio.move_on_after(_STDERR_SECONDS, shield=True):
                    await keeper.ended.wait()
                pipe.close()
                with anyio.CancelScope(shield=True):
                    await keeper.ended.wait()


class _Keeper(asyncio.Protocol):
    def __init__(self, kept: bytearray) -> None:
        self._kept = kept
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self._kept += data
        del self._kept[:-_KEPT_STDERR_BYTES]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()
