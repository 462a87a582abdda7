"""Splits raw output by the tags of a model family, as it comes."""

from __future__ import annotations

import json
from typing import Literal

from sfi_agent.session.output_pieces import OutputPiece, held_back_length
from sfi_agent.session.tool_calls import (
    CallFormat,
    RawCall,
    Schemas,
    hermes_calls,
    llama_calls,
    looks_like_llama_call,
    mistral_calls,
)

__all__ = ["FamilySplitter", "family_tags"]

_CALL_OPEN = {"hermes": "<tool_call>", "llama": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
_CALL_CLOSE = "</tool_call>"
_MARKUP = ("[ARGS]", "[CALL_ID]", _CALL_CLOSE)


def family_tags(template_source: str, call_format: CallFormat) -> tuple[str, ...]:
    """All control text that means something to the splitter of this family."""
    think = _think_tags(template_source)
    opening = _CALL_OPEN.get(call_format)
    return (*think, *_MARKUP, *([opening] if opening else []))


def _think_tags(template_source: str) -> tuple[str, str]:
    if "[THINK]" in template_source:
        return "[THINK]", "[/THINK]"
    return "<think>", "</think>"


class FamilySplitter:
    """A state machine over the tags of one family.

    Reasoning is recognised only where an answer begins; calls are, wherever their opening tag
    stands in the answer. Bare JSON that may be a call (Llama) is held back until it is decided.

    Args:
        call_format: How the family writes calls; "none" for sessions without tools.
        template_source: Source of the chat template, for the family's reasoning tags.
        prompt_text: End of the prompt's text: templates may open the reasoning themselves.
        schemas: Argument schemas by tool name.
    """

    def __init__(
        self,
        call_format: CallFormat,
        *,
        template_source: str = "",
        prompt_text: str = "",
        schemas: Schemas | None = None,
    ) -> None:
        self._format = call_format
        self._think_open, self._think_close = _think_tags(template_source)
        self._call_open = _CALL_OPEN.get(call_format, "")
        self._schemas = schemas or {}
        self._buffer = ""
        self._closes_seen = 0
        self._first_close = -1
        prefilled = prompt_text.rstrip().endswith(self._think_open)
        self._state: Literal["start", "text", "reasoning", "call", "bare_json"] = (
            "reasoning" if prefilled else "start"
        )

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

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
            return self._until(self._think_close, "reasoning", pieces)
        if self._state == "text":
            return self._until(self._call_open, "text", pieces)
        if self._state == "bare_json":
            return self._check_bare_json()
        return self._format == "hermes" and self._close_hermes(pieces)

    def _leave_start(self) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        if text.startswith(self._think_open):
            self._buffer = text[len(self._think_open) :]
            self._state = "reasoning"
            return True
        if self._think_open.startswith(text):
            return False
        bare = self._format == "llama" and text.startswith("{")
        self._state = "bare_json" if bare else "text"
        return True

    def _until(
        self, tag: str, kind: Literal["text", "reasoning"], pieces: list[OutputPiece]
    ) -> bool:
        """Hand out text up to a tag, or up to what may be its start."""
        found = self._buffer.find(tag) if tag else -1
        end = found if found >= 0 else len(self._buffer) - held_back_length(self._buffer, tag)
        if end > 0:
            pieces.append(OutputPiece(kind, self._buffer[:end]))
        if found < 0:
            self._buffer = self._buffer[end:]
            return False
        self._buffer = self._buffer[found + len(tag) :]
        if kind == "reasoning":
            pieces.append(OutputPiece("reasoning_end"))
            self._state = "start"
        else:
            self._enter_call()
        return True

    def _enter_call(self) -> None:
        self._state, self._closes_seen, self._first_close = "call", 0, -1

    def _check_bare_json(self) -> bool:
        if looks_like_llama_call(self._buffer):
            return False
        self._state = "text"
        return True

    def _close_hermes(self, pieces: list[OutputPiece]) -> bool:
        """End the call at the closing tag. One inside a string of the arguments does not count."""
        found = self._buffer.find(_CALL_CLOSE, self._closes_seen)
        if found < 0:
            self._closes_seen = max(self._closes_seen, len(self._buffer) - len(_CALL_CLOSE) + 1)
            return False
        status = _json_status(self._buffer[:found])
        if status == "in_string":
            self._closes_seen = found + 1
            self._first_close = found if self._first_close < 0 else self._first_close
            return True
        # Broken although an earlier tag was passed over: a quote was forgotten before that one.
        passed_over = status == "broken" and self._first_close >= 0
        self._end_call(pieces, self._first_close if passed_over else found)
        return True

    def _end_call(self, pieces: list[OutputPiece], end: int) -> None:
        body = self._buffer[:end]
        self._buffer = self._buffer[end + len(_CALL_CLOSE) :]
        self._state = "text"
        _add_calls(pieces, hermes_calls(body, closed=True, schemas=self._schemas))

    def _finish_state(self, pieces: list[OutputPiece]) -> None:
        rest, self._buffer = self._buffer, ""
        if self._state == "call" and self._format == "hermes":
            self._finish_hermes(pieces, rest)
        elif self._state == "call":
            self._state = "text"
            tagged = llama_calls(rest, tagged=True) if self._format == "llama" else None
            _add_calls(pieces, mistral_calls(rest) if tagged is None else tagged)
        elif self._state == "bare_json":
            self._state = "text"
            calls = llama_calls(rest, tagged=False)
            if calls is None:
                pieces.append(OutputPiece("text", rest))
            else:
                _add_calls(pieces, calls)
        else:
            kind: Literal["text", "reasoning"] = "reasoning" if self.in_reasoning else "text"
            pieces.append(OutputPiece(kind, rest))

    def _finish_hermes(self, pieces: list[OutputPiece], rest: str) -> None:
        # A quote the model forgot hid the closing tag: the first one was meant.
        self._buffer = rest
        if self._first_close >= 0:
            self._end_call(pieces, self._first_close)
            return
        self._buffer, self._state = "", "text"
        _add_calls(pieces, hermes_calls(rest, closed=False, schemas=self._schemas))


def _add_calls(pieces: list[OutputPiece], calls: list[RawCall]) -> None:
    pieces.extend(OutputPiece("call", call=call) for call in calls)


def _json_status(body: str) -> Literal["whole", "in_string", "broken"]:
    """Whether JSON text is complete, ends inside a string, or is broken otherwise."""
    try:
        json.loads(body, strict=False)
    except json.JSONDecodeError as error:
        return "in_string" if error.msg.startswith("Unterminated string") else "broken"
    except RecursionError:
        return "broken"
    return "whole"
