"""Splits raw output by the tags of a model family, as it comes."""

from __future__ import annotations

import copy
from typing import Literal

from sfi_agent.session.output.call_styles import CallRegion, CallStyle
from sfi_agent.session.output.json_bodies import llama_calls, looks_like_llama_call
from sfi_agent.session.output.output_pieces import OutputPiece, held_back_length
from sfi_agent.session.output.reasoning_tags import ReasoningTags
from sfi_agent.session.output.tool_calls import RawCall, Schemas

__all__ = ["FamilySplitter"]


class FamilySplitter:
    """A state machine over the tags of one family.

    Reasoning is recognised only where an answer begins; calls are, wherever their opening tag
    stands in the answer. Bare JSON that may be a call (Llama) is held back until it is decided.

    Args:
        style: How the family writes calls; `CallStyle()` for sessions without tools.
        reasoning: Between which tags the family reasons.
        bare_json: Whether JSON at the start of an answer may be a call.
        prompt_text: End of the prompt's text: templates may open the reasoning themselves.
        schemas: Argument schemas by tool name.
    """

    def __init__(
        self,
        style: CallStyle,
        reasoning: ReasoningTags,
        *,
        bare_json: bool = False,
        prompt_text: str = "",
        schemas: Schemas | None = None,
    ) -> None:
        self._style = style
        self._reasoning = reasoning
        self._bare_json = bare_json
        self._schemas = schemas or {}
        self._tags = (*(region.opening for region in style.regions), *style.ignored)
        self._region: CallRegion | None = None
        self._buffer = ""
        self._closes_seen = 0
        self._first_close = -1
        prefilled = prompt_text.rstrip().endswith(reasoning.opening)
        self._state: Literal["start", "text", "reasoning", "call", "bare_json"] = (
            "reasoning" if prefilled else "start"
        )

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

    @property
    def in_call(self) -> bool:
        return self._state in ("call", "bare_json")

    @property
    def may_open_call(self) -> bool:
        return self._state in ("start", "text")

    def copy(self) -> FamilySplitter:
        """See `OutputSplitter`."""
        return copy.copy(self)

    def feed(self, text: str) -> list[OutputPiece]:
        """See `OutputSplitter`."""
        self._buffer += text
        pieces: list[OutputPiece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[OutputPiece]:
        """See `OutputSplitter`."""
        pieces: list[OutputPiece] = []
        while self._buffer or self._state == "call":
            state, before = self._state, len(self._buffer)
            self._finish_state(pieces)
            while self._advance(pieces):
                pass
            if self._state == state and len(self._buffer) == before:
                break
        return pieces

    def _advance(self, pieces: list[OutputPiece]) -> bool:
        """One transition; False when more text is needed."""
        if self._state == "start":
            return self._leave_start()
        if self._state == "reasoning":
            return self._reason(pieces)
        if self._state == "text":
            return self._talk(pieces)
        if self._state == "bare_json":
            return self._check_bare_json()
        return self._close_call(pieces)

    def _leave_start(self) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        if text.startswith(self._reasoning.opening):
            self._buffer = text[len(self._reasoning.opening) :]
            self._state = "reasoning"
            return True
        if self._reasoning.opening.startswith(text):
            return False
        self._state = "bare_json" if self._bare_json and text.startswith("{") else "text"
        return True

    def _reason(self, pieces: list[OutputPiece]) -> bool:
        found = self._hand_out("reasoning", (self._reasoning.closing,), pieces)
        if found is None:
            return False
        pieces.append(OutputPiece("reasoning_end"))
        self._state = "start"
        return True

    def _talk(self, pieces: list[OutputPiece]) -> bool:
        found = self._hand_out("text", self._tags, pieces)
        if found is None:
            return False
        region = next((item for item in self._style.regions if item.opening == found), None)
        if region is not None:
            self._region, self._state = region, "call"
            self._closes_seen, self._first_close = 0, -1
        return True

    def _hand_out(
        self, kind: Literal["text", "reasoning"], tags: tuple[str, ...], pieces: list[OutputPiece]
    ) -> str | None:
        """Text up to the first of the tags, which is then gone; without one, None and text up to
        what may be the start of one."""
        places = [(self._buffer.find(tag), -len(tag), tag) for tag in tags]
        start, _, tag = min((place for place in places if place[0] >= 0), default=(-1, 0, ""))
        if start < 0:
            held = max((held_back_length(self._buffer, tag) for tag in tags), default=0)
            start = len(self._buffer) - held
        if start > 0:
            pieces.append(OutputPiece(kind, self._buffer[:start]))
        self._buffer = self._buffer[start + len(tag) :]
        return tag or None

    def _check_bare_json(self) -> bool:
        if looks_like_llama_call(self._buffer):
            return False
        self._state = "text"
        return True

    def _close_call(self, pieces: list[OutputPiece]) -> bool:
        """End the call at the closing tag. One inside a value of the arguments does not count."""
        closing = self._region.closing if self._region is not None else ""
        if not closing:
            return False
        found = self._buffer.find(closing, self._closes_seen)
        if found < 0:
            self._closes_seen = max(self._closes_seen, len(self._buffer) - len(closing) + 1)
            return False
        status = self._style.status(self._body(found))
        if status == "open":
            self._closes_seen = found + 1
            self._first_close = found if self._first_close < 0 else self._first_close
            return True
        # Broken although an earlier tag was passed over: a quote was forgotten before that one.
        passed_over = status == "broken" and self._first_close >= 0
        self._end_call(pieces, self._first_close if passed_over else found)
        return True

    def _body(self, end: int) -> str:
        """The call's text up to a place in the buffer."""
        keeps = self._region is not None and self._region.keeps_tags
        opening = self._region.opening if self._region is not None and keeps else ""
        return opening + self._buffer[:end]

    def _end_call(self, pieces: list[OutputPiece], end: int) -> None:
        assert self._region is not None
        closing = self._region.closing
        body = self._body(end) + (closing if self._region.keeps_tags else "")
        self._buffer = self._buffer[end + len(closing) :]
        self._state = "text"
        _add_calls(pieces, self._style.read(body, True, self._schemas))

    def _finish_state(self, pieces: list[OutputPiece]) -> None:
        if self._state == "call":
            self._finish_call(pieces)
            return
        rest, self._buffer = self._buffer, ""
        if self._state == "bare_json":
            self._state = "text"
            calls = llama_calls(rest, tagged=False)
            if calls is not None:
                _add_calls(pieces, calls)
                return
        pieces.append(OutputPiece("reasoning" if self.in_reasoning else "text", rest))

    def _finish_call(self, pieces: list[OutputPiece]) -> None:
        # A quote the model forgot hid the closing tag: the first one was meant.
        if self._first_close >= 0:
            self._end_call(pieces, self._first_close)
            return
        body = self._body(len(self._buffer))
        self._buffer, self._state = "", "text"
        _add_calls(pieces, self._style.read(body, False, self._schemas))


def _add_calls(pieces: list[OutputPiece], calls: list[RawCall]) -> None:
    pieces.extend(OutputPiece("call", call=call) for call in calls)
