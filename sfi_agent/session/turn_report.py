"""What is said of a turn when it is over: its reply, and its log event."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sfi_agent.observe.log import log_event
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.output.output_reader import ParsedOutput
from sfi_agent.session.reply import CancelledBy, FinishReason, Reply, Usage

__all__ = ["log_reply", "reply_of"]


def reply_of(
    parsed: ParsedOutput,
    usage: Usage,
    records: Sequence[StepRecord],
    stop_ids: Collection[int],
    cancelled_by: CancelledBy | None,
) -> Reply:
    """The reply of a turn.

    Args:
        parsed: What the model wrote.
        usage: What it cost.
        records: Of the generated tokens.
        stop_ids: Those that end a turn.
        cancelled_by: Who asked for the end by now; an answer that had ended by itself has still.
    """
    reason: FinishReason = "tool_calls" if parsed.calls else "stop"
    by: CancelledBy | None = None
    if not records or records[-1].token_id not in stop_ids:
        reason, by = ("length", None) if cancelled_by is None else ("cancelled", cancelled_by)
    return Reply(parsed.text, parsed.calls, parsed.reasoning, usage, reason, tuple(records), by)


def log_reply(session_id: str, turn: int, reply: Reply, detail: str, seconds: float) -> None:
    """Log that a turn is over.

    Args:
        session_id: Whose.
        turn: Its number, from 1.
        reply: What came of it.
        detail: Why history was given up, "" where none was.
        seconds: Wall-clock time.
    """
    usage, kinds = reply.usage, [record.kind for record in reply.steps]
    log_event(
        "info",
        "turn_finished",
        session=session_id,
        turn=turn,
        finish_reason=reply.finish_reason,
        cancelled_by=reply.cancelled_by,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        prefilled_tokens=usage.prefilled_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        reuse_lost_reason=usage.reuse_lost_reason,
        reuse_lost_detail=detail or None,
        fast_tokens=kinds.count("fast"),
        slow_tokens=kinds.count("slow"),
        retry_tokens=kinds.count("retry"),
        seconds=round(seconds, 6),
    )
