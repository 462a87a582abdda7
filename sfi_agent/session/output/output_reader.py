"""Reads a turn's raw output: text, reasoning and tool calls, while it is generated and at its end.

Streamed events and the final view come from the same pass, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from sfi_agent.session.events import ReasoningDelta, TextDelta, ToolCall
from sfi_agent.session.output.call_styles import CallFormat, CallStyle, call_style
from sfi_agent.session.output.channel_splitter import CHANNEL_TAGS, ChannelSplitter
from sfi_agent.session.output.family_splitter import FamilySplitter
from sfi_agent.session.output.joined_text import JoinedText
from sfi_agent.session.output.output_pieces import OutputPiece, OutputSplitter
from sfi_agent.session.output.reasoning_tags import reasoning_tags
from sfi_agent.session.output.template_splitter import TemplateSplitter, response_template_text
from sfi_agent.session.output.text_stream import TextStream
from sfi_agent.session.output.tool_calls import RawCall
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.tool_use.json_schema import without_references

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["OutputEvent", "OutputFormat", "OutputReader", "ParsedOutput", "parse_output"]

OutputEvent: TypeAlias = TextDelta | ReasoningDelta | ToolCall


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A turn's output as a view. The ids stay the truth.

    Attributes:
        text: The answer without reasoning, calls and control tokens.
        reasoning: The reasoning; "" without any.
        calls: Calls in the order written, malformed ones included.
        reasoning_tokens: Tokens that belonged to the reasoning, its tags included.
    """

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    reasoning_tokens: int

    def as_message(self) -> dict[str, Any]:
        """The assistant message of this output, as chat templates take it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [_call_message(call) for call in self.calls]
        return message


class OutputFormat:
    """How one checkpoint writes its turns. Made once per session, makes a reader per turn.

    The tokenizer's `response_template` decides where there is one, otherwise the call format
    that the chat template shows.

    Args:
        tokenizer: Any tokenizer of transformers.
        template_source: Source of the chat template; "" without one.
        tool_schemas: The session's tools as chat templates take them. Without tools nothing is
            taken for a call, unless a response template says so.
        stop_ids: Tokens that end a turn; they are no part of the text.

    Attributes:
        name: "response_template", or the family's call format.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_source: str = "",
        tool_schemas: Sequence[Mapping[str, Any]] = (),
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._source = template_source
        self._schemas = tuple(tool_schemas)
        self._arguments = {
            schema["function"]["name"]: without_references(schema["function"].get("parameters", {}))
            for schema in self._schemas
        }
        response_text = response_template_text(tokenizer)
        can_render = bool(template_source and tool_schemas)
        renderer = partial(ChatTemplate, tokenizer, tool_schemas) if can_render else None
        shown, style = call_style(template_source, renderer)
        self._has_channels = shown in ("harmony", "recipients")
        self._call_format = shown if tool_schemas else "none"
        self._style = style if tool_schemas else CallStyle()
        self._reasoning = reasoning_tags(template_source)
        self.name = self._call_format if response_text is None else "response_template"
        self._strips_text = response_text is not None and _strips_content(tokenizer)
        tags = (*self._style.tags, *self._reasoning, *(CHANNEL_TAGS if self._has_channels else ()))
        markup = "\n".join(tags) if response_text is None else response_text
        hidden = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in markup
        }
        self.hidden_ids = frozenset(hidden | stop_ids)

    @property
    def template_source(self) -> str:
        """Source of the chat template."""
        return self._source

    @property
    def call_format(self) -> CallFormat:
        """The call format that the chat template shows, whoever reads it."""
        return self._call_format

    @property
    def call_style(self) -> CallStyle:
        """Where calls stand in that format."""
        return self._style

    def reader(self, prompt_text: str = "", first_call_number: int = 0) -> OutputReader:
        """A reader for one turn.

        Args:
            prompt_text: End of the prompt as text (the last message and what the template writes
                after it suffice): templates may begin the model's message themselves.
            first_call_number: Calls this session has seen; ids go on from there.
        """
        return OutputReader(
            self.splitter(prompt_text),
            self.hidden_ids,
            first_call_number,
            strip_text=self._strips_text,
        )

    def splitter(self, prompt_text: str) -> OutputSplitter:
        """Finds the parts of one turn's text; `prompt_text` as in `reader`."""
        if self.name == "response_template":
            return TemplateSplitter(self._tokenizer, prompt_text=prompt_text, schemas=self._schemas)
        schemas = self._arguments
        if self._has_channels:
            return ChannelSplitter(
                self._style if self._call_format == "recipients" else None,
                reads_calls=self._call_format != "none",
                prompt_text=prompt_text,
                schemas=schemas,
            )
        return FamilySplitter(
            self._style,
            self._reasoning,
            bare_json=self._call_format == "llama",
            prompt_text=prompt_text,
            schemas=schemas,
        )


class OutputReader:
    """Turns the pieces of one turn into events and, at its end, into a `ParsedOutput`.

    White space between the parts (reasoning, text, calls) is left out. Calls are events when they
    are complete.

    Args:
        splitter: Finds the parts.
        hidden_ids: Control tokens that are no part of any text.
        first_call_number: Number of the first call's id.
        strip_text: Leave white space out at both ends of the text as well.
    """

    def __init__(
        self,
        splitter: OutputSplitter,
        hidden_ids: frozenset[int] = frozenset(),
        first_call_number: int = 0,
        *,
        strip_text: bool = False,
    ) -> None:
        self._splitter = splitter
        self._hidden_ids = hidden_ids
        self._first_call_number = first_call_number
        self._text = JoinedText(after_markup=strip_text)
        self._strip_text = strip_text
        self._reasoning = JoinedText(after_markup=True)
        self._calls: list[ToolCall] = []
        self._reasoning_tokens = 0

    def feed(self, token_id: int, text: str) -> list[OutputEvent]:
        """Take a token and the raw text it adds (control tokens included, "" is fine)."""
        before = self._splitter.in_reasoning
        events = [] if token_id in self._hidden_ids else self.feed_text(text)
        self._reasoning_tokens += before or self._splitter.in_reasoning
        return events

    def feed_text(self, text: str) -> list[OutputEvent]:
        """Take text that belongs to no single token."""
        return self._events(self._splitter.feed(text)) if text else []

    def finish(self) -> list[OutputEvent]:
        """The turn is over: what was held back. Not to be fed afterwards."""
        events = self._events(self._splitter.finish())
        rest = "" if self._strip_text else self._text.end()
        return [*events, TextDelta(rest)] if rest else events

    @property
    def parsed(self) -> ParsedOutput:
        """What was read so far."""
        return ParsedOutput(
            self._text.value, self._reasoning.value, tuple(self._calls), self._reasoning_tokens
        )

    def _events(self, pieces: Sequence[OutputPiece]) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        for piece in pieces:
            if piece.kind == "text" and (text := self._text.add(piece.text)):
                events.append(TextDelta(text))
            elif piece.kind == "reasoning" and (text := self._reasoning.add(piece.text)):
                events.append(ReasoningDelta(text))
            elif piece.kind == "reasoning_end":
                self._reasoning.interrupt()
                self._text.interrupt()
            elif piece.kind == "text_end":
                self._text.interrupt()
            elif piece.call is not None:
                self._text.interrupt()
                events.append(self._number(piece.call))
        return events

    def _number(self, call: RawCall) -> ToolCall:
        number = self._first_call_number + len(self._calls)
        numbered = ToolCall(
            f"call_{number}", call.name, call.arguments, call.raw_text, error=call.error
        )
        self._calls.append(numbered)
        return numbered


def parse_output(
    output_format: OutputFormat,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    prompt_text: str = "",
    first_call_number: int = 0,
) -> ParsedOutput:
    """Read a whole turn at once, from the model's raw ids."""
    reader = output_format.reader(prompt_text, first_call_number)
    stream = TextStream(tokenizer)
    for token_id in token_ids:
        reader.feed(token_id, stream.push(token_id))
    reader.feed_text(stream.finish())
    reader.finish()
    return reader.parsed


def _strips_content(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the response template strips the text: it does unless it says otherwise."""
    fields: Mapping[str, Any] = tokenizer.response_template.get("fields", {})
    arguments: Mapping[str, Any] = fields.get("content", {}).get("content_args", {})
    return bool(arguments.get("strip", True))


def _call_message(call: ToolCall) -> dict[str, Any]:
    # A call that could not be read is shown with its raw text, so that its answer makes sense.
    arguments = dict(call.arguments) if call.error is None else {"raw_text": call.raw_text}
    function = {"name": call.name or "unknown", "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
