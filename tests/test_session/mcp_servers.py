"""MCP servers for tests: one in this process, one beside it, and how a session would call them."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import mcp_types
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

from sfi_agent import McpTools, ToolCall
from sfi_agent.session.tool_use.tools import ToolSet

__all__ = ["RAW_NAMES", "nothing_stays", "office", "raw", "run"]

RAW_NAMES = ["changed", "die", "garbage", "malformed", "no_content", "refused", "silent", "zeta"]
_RAW_SERVER = Path(__file__).with_name("raw_mcp_server.py")


@contextmanager
def nothing_stays() -> Iterator[None]:
    """No thread of ours stays; servers configure logging, which is put back."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level
    assert [item.name for item in threading.enumerate() if "tools of" in item.name] == []


def office(**options: Any) -> MCPServer[Any]:
    """A server with tools of several kinds."""
    server: MCPServer[Any] = MCPServer("office", log_level="CRITICAL", **options)

    @server.tool(annotations=mcp_types.ToolAnnotations(read_only_hint=True, title="Rooms"))
    def find_room(name: str, floor: int | None = None) -> dict[str, Any]:
        """Finds a room."""
        return {"name": name, "room": 10 * (floor or 1) + 2}

    @server.tool()
    def fail(reason: str) -> str:
        """Fails."""
        raise LookupError(f"nothing about {reason}")

    @server.tool()
    def repeat(text: str) -> str:
        """Says it again."""
        return text

    @server.tool()
    async def wait(seconds: float) -> str:
        """Waits."""
        await anyio.sleep(seconds)
        return "waited"

    @server.tool()
    async def change(ctx: Context[Any, Any]) -> str:
        """Changes the tools."""
        await ctx.notify_tools_changed()
        return "changed"

    return server


def raw(log: Path, *options: str) -> list[str]:
    """The command line of the server that is written by hand; -S and -E let it start fast."""
    return [sys.executable, "-ES", str(_RAW_SERVER), str(log), *options]


def run(server: McpTools, tool: str, /, **arguments: Any) -> tuple[str, bool]:
    """What a session would tell the model: content, and whether it is an error."""
    result = ToolSet(server.tools).run(ToolCall("call_0", tool, arguments, ""))
    return result.content, result.is_error
