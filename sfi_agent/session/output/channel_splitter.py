"""Splits raw output that consists of messages with a header each, as it comes.

A turn is written as `header<|message|>body<|end|>`, several times, with `<|start|>` between them.
The header says what the body is: reasoning (the channel analysis, or addressed to oneself), text
(the channel final, or addressed to the user), or a call (addressed to a tool).
"""

from __future__ import annotations

import copy
import re
from typing import Literal

from sfi_agent.session.output.call_styles import CallStyle
from sfi_agent.session.output.family_splitter import FamilySplitter
from sfi_agent.session.output.output_pieces import OutputPiece, held_back_length
from sfi_agent.session.output.reasoning_tags import ReasoningTags
from sfi_agent.session.output.tool_calls import (
    JSON_DECODER,
    RawCall,
    Schemas,
    calls_in_value,
    json_problem,
    unreadable_call,
)

__all__ = ["CHANNEL_TAGS", "ChannelSplitter"]

_START, _MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|eom|>", "<|eot|>")
CHANNEL_TAGS = (_START, _MESSAGE, "<|channel|>", "<|constrain|>", *_ENDS)
"""Control text that means something here."""

_LONGEST_HEADER = 256
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_HEADER = re.compile(r"\s*(?:\Z|<\|(?:start|channel|constrain)|to=)")
"""A header, or the beginning of one."""
_NO_TOOLS = frozenset({"self", "user", "assistant", "all"})
_NO_REASONING_TAGS = ReasoningTags("\0", "\0")


class ChannelSplitter:
    """A state machine over messages with headers.

    Args:
        style: How calls are written inside a message to a tool; None where the body is the JSON of
            the arguments and the header names the tool.
        reads_calls: Whether there are tools; without, what is addressed to one is text.
        prompt_text: End of the prompt's text: templates begin the first header.
        schemas: Argument schemas by tool name.
    """

    def __init__(
        self,
        style: CallStyle | None,
        *,
        reads_calls: bool,
        prompt_text: str = "",
        schemas: Schemas | None = None,
    ) -> None:
        self._style = style
        self._reads_calls = reads_calls
        self._schemas = schemas or {}
        self._state: Literal["header", "text", "reasoning", "call"] = "header"
        self._name = ""
        self._texts = 0
        _, begun, header = prompt_text.rpartition(_START)
        self._buffer = header if begun else ""
        # Of the header that the template began nothing was written by the model.
        self._given = len(self._buffer)
        self._advance_all([])

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

    @property
    def in_call(self) -> bool:
        # The header names the tool, which belongs to the call as much as its arguments do.
        return self._state == "call" or (self._state == "header" and "to=" in self._buffer)

    @property
    def may_open_call(self) -> bool:
        return self._state == "header" and not self.in_call

    def copy(self) -> ChannelSplitter:
        """See `OutputSplitter`."""
        return copy.copy(self)

    def feed(self, text: str) -> list[OutputPiece]:
        """See `OutputSplitter`."""
        self._buffer += text
        pieces: list[OutputPiece] = []
        self._advance_all(pieces)
        return pieces

    def finish(self) -> list[OutputPiece]:
        """See `OutputSplitter`."""
        pieces: list[OutputPiece] = []
        rest, self._buffer = self._buffer, ""
        if self._state == "call":
            pieces += self._calls(rest, closed=False)
        elif self._state != "header":
            pieces.append(OutputPiece(self._state, rest))
        elif not _HEADER.match(rest[self._given :]):
            # No message came of it: a model that does not keep to the format.
            pieces.append(OutputPiece("text", rest[self._given :]))
        return [piece for piece in pieces if piece.text or piece.kind == "call"]

    def _advance_all(self, pieces: list[OutputPiece]) -> None:
        while self._read_header(pieces) if self._state == "header" else self._read_body(pieces):
            pass

    def _read_header(self, pieces: list[OutputPiece]) -> bool:
        found = self._buffer.find(_MESSAGE)
        if 0 <= found <= _LONGEST_HEADER:
            header = self._buffer[:found].rpartition(_START)[2]
            self._buffer = self._buffer[found + len(_MESSAGE) :]
            self._enter(header, pieces)
            return True
        if len(self._buffer) < _LONGEST_HEADER + len(_MESSAGE):
            return False
        # Too long for a header: a model that does not keep to the format.
        self._buffer = self._buffer[self._given :]
        self._enter("", pieces)
        return True

    def _enter(self, header: str, pieces: list[OutputPiece]) -> None:
        self._given = 0
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        name = recipient.group(1).removeprefix("functions.") if recipient else ""
        if name and name not in _NO_TOOLS and self._reads_calls:
            self._name, self._state = name, "call"
        elif name == "self" or (channel and channel.group(1) == "analysis"):
            self._state = "reasoning"
        else:
            self._state = "text"
            if self._texts:
                pieces.append(OutputPiece("text_end"))
            self._texts += 1

    def _read_body(self, pieces: list[OutputPiece]) -> bool:
        tags = (*_ENDS, _START)
        places = [(self._buffer.find(tag), tag) for tag in tags if tag in self._buffer]
        if not places:
            if self._state != "call":
                held = max(held_back_length(self._buffer, tag) for tag in tags)
                self._hand_out(len(self._buffer) - held, pieces)
            return False
        end, tag = min(places)
        if self._state == "call":
            pieces += self._calls(self._buffer[:end], closed=True)
            self._buffer = self._buffer[end:]
        else:
            self._hand_out(end, pieces)
        if self._state == "reasoning":
            pieces.append(OutputPiece("reasoning_end"))
        self._buffer = self._buffer[len(tag) :]
        self._state = "header"
        return True

    def _hand_out(self, end: int, pieces: list[OutputPiece]) -> None:
        assert self._state in ("text", "reasoning")
        if end > 0:
            pieces.append(OutputPiece(self._state, self._buffer[:end]))
        self._buffer = self._buffer[end:]

    def _calls(self, body: str, *, closed: bool) -> list[OutputPiece]:
        if self._style is None:
            return [OutputPiece("call", call=call) for call in _call(self._name, body, closed)]
        inside = FamilySplitter(self._style, _NO_REASONING_TAGS, schemas=self._schemas)
        pieces = [*inside.feed(body), *inside.finish()]
        if not any(piece.kind == "call" for piece in pieces):
            problem = "it holds no call" if closed else "it is not closed; it may be cut off"
            call = unreadable_call(body.strip(), problem, self._name)
            return [OutputPiece("call", call=call)]
        return [piece for piece in pieces if piece.kind == "call"]


def _call(name: str, body: str, closed: bool) -> list[RawCall]:
    text = body.strip()
    try:
        arguments = JSON_DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return [unreadable_call(text, json_problem(error, closed=closed), name)]
    return calls_in_value({"name": name, "arguments": arguments}, text)
