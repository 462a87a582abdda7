"""An MCP server over stdio that is written by hand: fast to start, and able to be wrong.

python raw_mcp_server.py LOG [mute]: its process id, calls that it leaves unanswered, what clients
cancel, and the end, are written to the file LOG. A mute one answers nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LOG = Path(sys.argv[1])
PAGE = 3
NAMES = ("zeta", "malformed", "no_content", "refused", "changed", "die", "silent", "garbage")


def tool(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    return {"name": name, "description": f"Does {name}.", "inputSchema": schema}


def listing(cursor: str | None) -> dict[str, Any]:
    start = int(cursor or 0)
    page: dict[str, Any] = {"tools": [tool(name) for name in NAMES[start : start + PAGE]]}
    if start + PAGE < len(NAMES):
        page["nextCursor"] = str(start + PAGE)
    return page


def text(content: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": content}]}


def send(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def note(word: str) -> None:
    with LOG.open("a") as file:
        file.write(f"{word}\n")


def call(number: Any, name: str, arguments: dict[str, Any]) -> None:
    if name == "die":
        sys.exit(3)
    if name == "silent":
        note("asked")
        return
    if name == "refused":
        send({"id": number, "error": {"code": -32000, "message": "not today"}})
        return
    if name == "changed":
        send({"method": "notifications/tools/list_changed"})
    if name == "garbage":
        print("this is no JSON", flush=True)
    results = {"malformed": {"content": 5}, "no_content": {"isError": False}}
    send({"id": number, "result": results.get(name, text(arguments.get("text", name)))})


def main(mute: bool) -> None:
    LOG.write_text(f"{os.getpid()}\n")
    answers: dict[str, Any] = {
        "initialize": lambda parameters: {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {"listChanged": True}},
            "serverInfo": {"name": "raw", "version": "1"},
            "instructions": "Be careful.",
        },
        "tools/list": lambda parameters: listing(parameters.get("cursor")),
    }
    for line in sys.stdin:
        message = {} if mute else json.loads(line)
        method, number = message.get("method"), message.get("id")
        parameters = message.get("params") or {}
        if method == "notifications/cancelled":
            note("cancelled")
        elif method in answers:
            send({"id": number, "result": answers[method](parameters)})
        elif method == "tools/call":
            call(number, parameters["name"], parameters.get("arguments") or {})
        elif number is not None:
            send({"id": number, "error": {"code": -32601, "message": "no such method"}})
    note("ended")


if __name__ == "__main__":
    main(mute=sys.argv[2:] == ["mute"])
