"""What the demo plays, as records: turns of both sessions and how far they agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sfi_agent.session.reply import FinishReason, Usage

if TYPE_CHECKING:
    from sfi_agent.cli.step_marks import ShownToken
    from sfi_agent.config import SessionConfig
    from sfi_agent.embedded import Conversation
    from sfi_agent.session.events import ToolCall, ToolResult
    from sfi_agent.session.stats import SessionStats

__all__ = ["Agreement", "AssistantTurn", "Demo", "DemoTurn", "PlayedTurn"]


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """What the model wrote in one go, and the tools that ran behind it.

    Attributes:
        tokens: Every generated token with its record, control tokens included.
        usage: Tokens of this turn.
        calls: The calls in it with their results, in order.
    """

    tokens: tuple[ShownToken, ...]
    usage: Usage
    calls: tuple[tuple[ToolCall, ToolResult], ...]


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """One user message answered by one session.

    Attributes:
        assistant_turns: The tool loop's turns; the last one holds the answer.
        text: The answer.
        finish_reason: Of the last turn.
        seconds: Wall-clock time of the whole loop, tools included.
        prefill_seconds: Of it, until each turn's first token: reading the new tokens.
        correct: Calls and answer are the expected ones.
    """

    assistant_turns: tuple[AssistantTurn, ...]
    text: str
    finish_reason: FinishReason
    seconds: float
    prefill_seconds: float
    correct: bool

    @property
    def tokens(self) -> list[ShownToken]:
        """All generated tokens."""
        return [token for turn in self.assistant_turns for token in turn.tokens]

    @property
    def decode_seconds(self) -> float:
        """What was left for the tokens after each turn's first."""
        return self.seconds - self.prefill_seconds

    @property
    def usage(self) -> Usage:
        """Tokens of all turns, added up."""
        total = Usage()
        for turn in self.assistant_turns:
            total = total + turn.usage
        return total


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two token sequences agree.

    Attributes:
        identical_tokens: Length of the common beginning.
        slow_fast_tokens, dense_tokens: Lengths of the two.
        same_answer: The answers are the same text.
    """

    identical_tokens: int
    slow_fast_tokens: int
    dense_tokens: int
    same_answer: bool

    @property
    def complete(self) -> bool:
        """Every token is identical."""
        return self.identical_tokens == self.slow_fast_tokens == self.dense_tokens


@dataclass(frozen=True, slots=True)
class DemoTurn:
    """One user message, its right answer, and both ways to decode.

    Attributes:
        user: The message.
        kind: Kind of the question; "open" for the first message, which has the log read.
        expected: The right answer; "" where any answer will do after the right call.
    """

    user: str
    kind: str
    expected: str
    slow_fast: PlayedTurn
    dense: PlayedTurn
    agreement: Agreement


@dataclass(slots=True)
class Demo:
    """Everything that was played.

    Attributes:
        conversation: Log and questions.
        log_tokens: Tokens of the log.
        config: The slow-fast policy.
        turns: In order.
        stats, dense_stats: Of the two sessions, at the end.
        seconds: From the first turn to the last, both sessions.
    """

    conversation: Conversation
    log_tokens: int
    config: SessionConfig
    turns: list[DemoTurn] = field(default_factory=list)
    stats: SessionStats | None = None
    dense_stats: SessionStats | None = None
    seconds: float = 0.0
