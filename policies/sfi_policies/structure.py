"""`structure`: a new piece of layout starts: a list item, a paragraph, code, thinking, a call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent
from sfi_policies._pieces import require_tokenizer

__all__ = ["Structure", "StructureConfig"]

_LONGEST_LINE = 120  # List markers and fences stand at the start of a line.
_LONGEST_TAG = 80
_LIST_MARKER = re.compile(r"[ \t>]*(?:[-*+\u2022\u2023\u25e6]|\d{1,3}[.)]|[A-Za-z][.)])[ \t]")
_FENCE = re.compile(r"[ \t>]*(?P<mark>`{3,}|~{3,})(?P<rest>[^`]*)")
# <tool_call>, </think>, <function=search>, <|python_tag|>, and the same with U+FF5C for the bar.
_ANGLE_TAG = (
    r"</?[|\uff5c]?(?:[\w.:-]*[_\u2581.:-])?"
    r"(?:(?P<thinking>think|thought|reason|scratchpad|channel)"
    r"|(?P<calling>tool|function|invoke|python_tag))[\w\u2581.:-]*"
    r"(?:[ =][^<>]*)?[|\uff5c]?/?>"
)
_SPELLED_ANGLE_TAG = re.compile(_ANGLE_TAG)
_TOKEN_ANGLE_TAG = re.compile(_ANGLE_TAG, re.IGNORECASE)
# In square brackets only capitals: [TOOL_CALLS]. Small letters there are links and footnotes.
_SQUARE_TAG = re.compile(r"\[/?[A-Z_]*(?:(?P<thinking>THINK)|(?P<calling>TOOL))[A-Z_]*\]")


class StructureConfig(Settings):
    """Options of `structure`: none."""


@dataclass(slots=True)
class _Layout:
    """Where in the layout the running text stands.

    Attributes:
        line: Start of the current line, up to a fixed length.
        column: Length of the current line so far, in characters.
        tag: The text since an opening angle or square bracket; empty outside one.
        fence: The mark of the open code block, such as three backticks; empty outside code.
        pending: What has begun and waits for its first visible character; empty for nothing.
        reported_at: Column of the current line at which a boundary was reported, or -1.
        has_text: Whether anything visible has been written in this decoding.
    """

    line: str = ""
    column: int = 0
    tag: str = ""
    fence: str = ""
    pending: str = ""
    reported_at: int = -1
    has_text: bool = False

    def read(self, character: str) -> str:
        """Take in one character; what begins with it, or nothing."""
        if character == "\n":
            self._end_line()
            return ""
        column = self.column
        self.column += 1
        if column < _LONGEST_LINE:
            self.line += character
        if character.isspace():
            self._follow_tag(character)
            self._find_list_marker()
            return ""
        begins, self.pending = self.pending, ""
        if begins:
            self.reported_at = column
        self.has_text = True
        self._follow_tag(character)
        return begins

    def begin(self, pending: str) -> None:
        """A tag that is one token stands here: it ends the line and any code block."""
        self.start_line()
        self.fence = ""
        self.pending = pending
        self.has_text = True

    def start_line(self) -> None:
        """Forget the line so far."""
        self.line = ""
        self.column = 0
        self.tag = ""
        self.reported_at = -1

    def _end_line(self) -> None:
        fence = _FENCE.fullmatch(self.line)
        if fence and self.fence:
            if fence["mark"].startswith(self.fence) and not fence["rest"].strip():
                self.fence = ""
                self.pending = "end of code"
        elif fence:
            self.fence = fence["mark"]
            self._begin_unless_reported("code fence", fence.start("mark"))
        elif not self.line.strip() and self.has_text:
            self.pending = self.pending or "blank line"
        self.start_line()

    def _find_list_marker(self) -> None:
        # Only the space behind the marker makes it one, so the line is looked at just then.
        if self.fence or self.column > _LONGEST_LINE or not _LIST_MARKER.fullmatch(self.line):
            return
        self._begin_unless_reported("list item", len(self.line) - len(self.line.lstrip(" \t>")))

    def _follow_tag(self, character: str) -> None:
        """Tags in code are code."""
        if self.fence:
            return
        if character in "<[":
            self.tag = character
        elif self.tag and len(self.tag) < _LONGEST_TAG:
            self.tag += character
            if character in ">]":
                kind = _kind_of_tag(self.tag, _SPELLED_ANGLE_TAG)
                if kind:
                    self._begin_unless_reported(kind, self.column - len(self.tag))
                self.tag = ""
        else:
            self.tag = ""

    def _begin_unless_reported(self, pending: str, column: int) -> None:
        """A mark whose own first character was reported makes no second boundary."""
        if self.reported_at != column:
            self.pending = pending


class Structure:
    """Reports the token with the first visible character of a new piece of layout.

    Pieces are what follows a think or tool-call tag (opening or closing), the first line of a
    code block, what follows its end, a list item behind its marker, and what follows a blank
    line. Inside a code block only blank lines and the block's end count, because lines of code
    look like lists and tags. Tags count whether they are single tokens (known by id, since a
    special token adds no text) or spelled out in several.

    Several marks in a row (a blank line and a list marker, a closing tag and a blank line) make
    one boundary. Works on the running text of any tokenizer. The first visible text of a
    decoding is no boundary: it comes from a dense step. Our own detector; the published triggers
    (Slow-Fast Inference, arXiv 2603.12038) know only sentence marks and stay silent here.

    Args:
        config: No options.
        tokenizer: A Hugging Face tokenizer; its added tokens are searched for tags.

    Raises:
        ConfigError: There is no tokenizer.
    """

    needs: frozenset[str] = frozenset({"text"})

    def __init__(self, config: StructureConfig, tokenizer: Any) -> None:
        require_tokenizer("structure", tokenizer, "the ids of its tool-call and think tags")
        self._tag_of_id = _tags_of(tokenizer)
        self._control_ids = frozenset(tokenizer.all_special_ids)
        self._layout = _Layout()

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Start behind the prompt, of which the unfinished last line is remembered."""
        line = prompt_text.rpartition("\n")[2]
        self._layout = _Layout(line=line[:_LONGEST_LINE], column=len(line))

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary: layout is seen in tokens."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """A boundary when this token holds the first visible character of a new piece."""
        tag = self._tag_of_id.get(event.token_id)
        if tag is not None:
            self._layout.begin(tag)
            return None
        if event.token_id in self._control_ids:
            self._layout.start_line()
            return None
        begun = [begins for begins in map(self._layout.read, event.text) if begins]
        return Boundary(f"structure: {begun[0]}") if begun else None

    def snapshot(self) -> tuple[Any, ...]:
        """The place in the layout; does not grow with the text."""
        return tuple(getattr(self._layout, field.name) for field in fields(_Layout))

    def restore(self, state: tuple[Any, ...]) -> None:
        """Return to such a place."""
        self._layout = _Layout(*state)


def _kind_of_tag(text: str, angle_tag: re.Pattern[str]) -> str:
    """What a tag is about; empty if it is some other tag."""
    match = angle_tag.fullmatch(text) or _SQUARE_TAG.fullmatch(text)
    if match is None:
        return ""
    return "think tag" if match["thinking"] else "tool-call tag"


def _tags_of(tokenizer: Any) -> Mapping[int, str]:
    """The added tokens, special or not, that are tags."""
    kinds = {
        token_id: _kind_of_tag(token.content.strip(), _TOKEN_ANGLE_TAG)
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    return {token_id: kind for token_id, kind in kinds.items() if kind}
