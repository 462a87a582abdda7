"""What a session's stream yields. Every event is a frozen record and holds no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sfi_agent.observe.trace import StepRecord

if TYPE_CHECKING:
    from sfi_agent.session.reply import Reply

__all__ = [
    "Event",
    "ReasoningDelta",
    "Step",
    "TextDelta",
    "ToolCall",
    "ToolResult",
    "ToolStart",
    "TurnEnd",
]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer. The texts of a turn, joined, are `reply.text`."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the model's reasoning. The texts of a turn, joined, are `reply.reasoning`."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call the model wrote, readable or not.

    Attributes:
        id: Unique in its session: "call_0", "call_1", ...
        name: The tool's name; "" where it could not be read.
        arguments: The arguments by name, plain JSON data; empty where they could not be read.
        raw_text: What the model wrote, without the tags around it.
        error: Why the call cannot be read, None for a well-formed call. Such a call is answered
            with this text as a tool result, so that the model can write it again.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]
    raw_text: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool begins to run. Calls that are refused or cannot be run have no such event."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gave back, as the text the model reads. Results come as tools finish.

    Attributes:
        call_id: `ToolCall.id` of the call it answers.
        name: The tool's name as the call gave it.
        content: The result as text, or what went wrong.
        is_error: The tool did not run, did not finish or raised an exception.
    """

    call_id: str
    name: str
    content: str
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One kept token.

    Attributes:
        record: How it was decoded.
        token_id: Its id.
        text: The raw text it adds, control tokens included; "" while a character is incomplete.
    """

    record: StepRecord
    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The last event of a turn.

    Attributes:
        reply: The turn's own answer, usage and steps; those of a run are sums over its turns.
    """

    reply: Reply


Event: TypeAlias = TextDelta | ReasoningDelta | ToolCall | ToolStart | ToolResult | Step | TurnEnd
