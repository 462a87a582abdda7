"""What splitters of raw output hand over: text, reasoning, and calls, in the order written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from sfi_agent.session.output.tool_calls import RawCall

__all__ = ["OutputPiece", "OutputSplitter", "held_back_length"]


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """A part of the output.

    Attributes:
        kind: "text" and "reasoning" carry more of their text; "reasoning_end" and "text_end" close
            a block of theirs; "call" carries one call.
        text: For "text" and "reasoning".
        call: For "call".
    """

    kind: Literal["text", "reasoning", "reasoning_end", "text_end", "call"]
    text: str = ""
    call: RawCall | None = None


class OutputSplitter(Protocol):
    """Splits raw output as it comes. Text that may be the start of a tag is held back."""

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next belongs to the reasoning."""
        ...

    @property
    def in_call(self) -> bool:
        """Whether what comes next belongs to a call, or to what may turn out to be one."""
        ...

    @property
    def may_open_call(self) -> bool:
        """Whether a call may open here: not inside one, and not in reasoning."""
        ...

    def feed(self, text: str) -> list[OutputPiece]:
        """Take more raw text and return what is certain now."""
        ...

    def finish(self) -> list[OutputPiece]:
        """The output is over: return the rest. Not to be fed afterwards."""
        ...

    def copy(self) -> OutputSplitter:
        """An independent one with the same past."""
        ...


def held_back_length(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag` without completing it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
