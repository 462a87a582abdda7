"""`sfi-agent chat --json`: one message per line in, one line of JSON per turn out."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sfi_agent.cli.interrupts import ctrl_c_cancels
from sfi_agent.cli.output import print_error, print_json
from sfi_agent.errors import SfiError

if TYPE_CHECKING:
    from sfi_agent.session.reply import Reply
    from sfi_agent.session.session import Session

__all__ = ["answer_lines"]


def answer_lines(session: Session, *, with_steps: bool) -> bool:
    """Answer every non-empty line of stdin; false if a message could not be answered.

    A message that fails prints `{"error": {"type", "message"}}`; the session goes on.
    """
    all_answered = True
    for line in sys.stdin:
        message = line.rstrip("\r\n")
        if not message.strip():
            continue
        try:
            with ctrl_c_cancels(session):
                reply = session.run(message)
        except SfiError as error:
            all_answered = False
            print_error(error)
            error_json = {"type": type(error).__name__, "message": str(error)}
            print_json({"error": error_json}, one_line=True)
            continue
        print_json(_turn(session, reply, with_steps), one_line=True)
    return all_answered


def _turn(session: Session, reply: Reply, with_steps: bool) -> dict[str, Any]:
    answer = {
        "text": reply.text,
        "reasoning": reply.reasoning,
        "tool_calls": [
            {**_fields(call), "arguments": dict(call.arguments)} for call in reply.tool_calls
        ],
        "finish_reason": reply.finish_reason,
    }
    if with_steps:
        answer["steps"] = [asdict(record) for record in reply.steps]
    return {"reply": answer, "usage": asdict(reply.usage), "stats": asdict(session.stats)}


def _fields(call: Any) -> dict[str, Any]:
    return {"id": call.id, "name": call.name, "raw_text": call.raw_text, "error": call.error}
