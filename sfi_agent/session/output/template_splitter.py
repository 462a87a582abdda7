"""Splits raw output by the tokenizer's response template, as it comes.

transformers' own parser raises on a call it cannot read and then discards the whole message. Here
it only finds the regions, with every call read as bare text; each call is then parsed alone by the
template's own rules, so that one broken call costs nothing but itself.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import TemplateError, explain
from sfi_agent.session.output.output_pieces import OutputPiece
from sfi_agent.session.output.tool_calls import (
    RawCall,
    calls_in_value,
    plain_data,
    unreadable_call,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TemplateSplitter", "response_template_text"]

_REASONING_FIELDS = frozenset({"reasoning_content", "reasoning", "thinking"})
_CALLS_FIELD = "tool_calls"
_BODY = "sfi_body"
# A character that no output contains; transformers' templates use \x01 and \x02 themselves.
_END = "\x00"
_LONGEST_DELIMITER = 128


def response_template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The response template as unescaped text, to look control tokens up in; None without one."""
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    return json.dumps(template.get("fields"), ensure_ascii=False).replace("\\", "")


class TemplateSplitter:
    """A splitter driven by `tokenizer.response_template`.

    Args:
        tokenizer: One that has a response template.
        prompt_text: End of the prompt's text, with the start of the assistant message.
        schemas: Tool schemas as chat templates take them, for types of arguments.

    Raises:
        TemplateError: The response template is not one that transformers can read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_text: str = "",
        schemas: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._schemas: list[dict[Any, Any] | Callable[..., Any]] = [
            dict(schema) for schema in schemas
        ]
        self._template: dict[str, Any] = dict(tokenizer.response_template)
        try:
            self._parser = tokenizer.get_response_parser(
                _find_regions_only(self._template), prefix=prompt_text
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TemplateError(
                explain(
                    "Read the tokenizer's response template",
                    got=f"{type(error).__name__}: {error}",
                    remedy="Correct tokenizer.response_template, or set it to None",
                )
            ) from error
        self._delimiters = _delimiters_at_end(self._template["fields"].get(_CALLS_FIELD, {}))
        self._tail = ""
        self._field: str | None = None
        for event in self._parser.initial_events:
            self._note(event)

    @property
    def in_reasoning(self) -> bool:
        return self._field in _REASONING_FIELDS

    @property
    def in_call(self) -> bool:
        """See `OutputSplitter`.

        The parser waits for one more character where a delimiter might go on, so at the end of one
        a copy is asked.
        """
        if not any(pattern.search(self._tail) for pattern in self._delimiters):
            return self._field == _CALLS_FIELD
        twin = self.copy()
        for event in twin._parser.feed(_END):
            twin._note(event)
        return twin._field == _CALLS_FIELD

    @property
    def may_open_call(self) -> bool:
        return not self.in_reasoning and not self.in_call

    def copy(self) -> TemplateSplitter:
        """See `OutputSplitter`."""
        twin = copy.copy(self)
        twin._parser = copy.deepcopy(self._parser)
        return twin

    def feed(self, text: str) -> list[OutputPiece]:
        """See `OutputSplitter`."""
        self._tail = (self._tail + text)[-_LONGEST_DELIMITER:]
        return self._pieces(self._parser.feed(text.replace(_END, "")), closed=True)

    def finish(self) -> list[OutputPiece]:
        """See `OutputSplitter`."""
        # One more character decides delimiters that could have gone on; what is open after it
        # was not closed by the model.
        pieces = self._pieces(self._parser.feed(_END), closed=True)
        _, events = self._parser.finalize()
        return pieces + self._pieces(events, closed=False)

    def _note(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "region_open":
            self._field = event["field"]
        elif event["type"] == "region_close":
            self._field = None

    def _pieces(self, events: Sequence[Mapping[str, Any]], *, closed: bool) -> list[OutputPiece]:
        pieces: list[OutputPiece] = []
        for event in events:
            self._note(event)
            name = event["field"]
            if event["type"] == "region_chunk" and name != _CALLS_FIELD:
                text = event["text"].replace(_END, "")
                if text and name in _REASONING_FIELDS:
                    pieces.append(OutputPiece("reasoning", text))
                elif text and name == "content":
                    pieces.append(OutputPiece("text", text))
            elif event["type"] == "region_close" and name in _REASONING_FIELDS:
                pieces.append(OutputPiece("reasoning_end"))
            elif event["type"] == "region_close" and name == _CALLS_FIELD:
                calls = self._calls(event["value"], closed)
                pieces.extend(OutputPiece("call", call=call) for call in calls)
        return pieces

    def _calls(self, region: Mapping[str, str], closed: bool) -> list[RawCall]:
        captured = {name: text for name, text in region.items() if name != _BODY}
        body = region[_BODY].replace(_END, "")
        raw_text = body.strip()
        spec = self._template["fields"][_CALLS_FIELD]
        has_close = "close" in spec or "close_pattern" in spec
        if has_close and not closed and spec.get("content") != "json":
            # Only JSON shows by itself whether something is missing.
            return [unreadable_call(raw_text, "it is not closed", captured.get("name", ""))]
        try:
            message = self._tokenizer.parse_response(
                f"{_END}{body}", _one_call_template(spec, captured), prefix="", tools=self._schemas
            )
            # transformers takes numbers that are none, and halves of characters.
            value = plain_data(message.get(_CALLS_FIELD))
        except Exception as error:
            # Content parsers and transforms raise ValueError, KeyError and what their data causes.
            problem = f"it does not parse: {_last_line(error)}"
            return [unreadable_call(raw_text, problem, captured.get("name", ""))]
        found = [call for item in value or [] for call in calls_in_value(item, raw_text)]
        return found or [unreadable_call(raw_text, "it is empty", captured.get("name", ""))]


def _delimiters_at_end(spec: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """One of them is found in text that ends where a call may begin or end."""
    given = [re.escape(spec[key]) for key in ("open", "close") if spec.get(key)]
    given += [spec[key] for key in ("open_pattern", "close_pattern") if spec.get(key)]
    try:
        return [re.compile(rf"(?:{pattern})\Z") for pattern in given]
    except re.error:
        # transformers reads patterns with a module that knows more; then any text may be one.
        return [re.compile(r"\Z")]


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix("Error: ") if lines else type(error).__name__


def _find_regions_only(template: Mapping[str, Any]) -> dict[str, Any]:
    """The template with every field read as bare text, which cannot fail."""
    fields = {}
    for name, spec in template["fields"].items():
        anchors = {key: spec[key] for key in _ANCHORS if key in spec}
        groups = _group_names(spec)
        fields[name] = {
            **anchors,
            "content": "text",
            "content_args": {"strip": False},
            "transform": {_BODY: "{content}", **{group: f"{{{group}}}" for group in groups}},
            "repeats": True,
            "optional": True,
        }
    return {**{key: template[key] for key in _TOP_KEYS if key in template}, "fields": fields}


_ANCHORS = ("open", "open_pattern", "close", "close_pattern")
_TOP_KEYS = ("version", "start_anchor", "start_anchor_pattern")


def _group_names(spec: Mapping[str, Any]) -> list[str]:
    patterns = (spec.get("open_pattern", ""), spec.get("close_pattern", ""))
    return [name for pattern in patterns for name in re.findall(r"\(\?P<(\w+)>", pattern)]


def _one_call_template(spec: Mapping[str, Any], captured: Mapping[str, str]) -> dict[str, Any]:
    """A template for the body of one call alone, with the captured texts put in place."""
    kept = {key: item for key, item in spec.items() if key not in (*_ANCHORS, "join")}
    if "transform" in kept:
        kept["transform"] = _with_captures(kept["transform"], captured)
    field = {**kept, "open": _END, "repeats": True, "optional": True}
    return {"version": 1, "start_anchor": _END * 2, "fields": {_CALLS_FIELD: field}}


def _with_captures(transform: Any, captured: Mapping[str, str]) -> Any:
    if isinstance(transform, Mapping):
        return {key: _with_captures(item, captured) for key, item in transform.items()}
    if isinstance(transform, list):
        return [_with_captures(item, captured) for item in transform]
    if isinstance(transform, str) and transform[1:-1] in captured and transform[:1] == "{":
        text = captured[transform[1:-1]]
        if "{" in text:
            raise ValueError(f"its name {text!r} contains a brace")
        return text
    return transform
