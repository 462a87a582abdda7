"""A tokenizer's chat template: rendering messages to text and ids, with what it cannot do named.

Chat templates are programs from outside. They differ in what they take for a tool call, may raise
anything, and may leave out what they do not know. This module finds out by rendering probes, never
by the name of a model.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeAlias

from sfi_agent.errors import TemplateError, explain
from sfi_agent.session.control_tokens import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Message", "MessageForm", "RenderFailure", "probe_text", "probe_tool"]

Message: TypeAlias = Mapping[str, Any]


class RenderFailure(Exception):
    """The template raised while rendering. Internal: callers turn it into what it means to them."""


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How a template wants tool calls, beyond the common form.

    Attributes:
        arguments_as_text: Call arguments are JSON text, not a mapping.
        nine_character_ids: Call ids are nine letters and digits.
        one_call_per_turn: An assistant message holds a single call; further ones are rendered as
            turns of their own.
    """

    arguments_as_text: bool = False
    nine_character_ids: bool = False
    one_call_per_turn: bool = False


_FORMS = tuple(
    MessageForm(as_text, nine, single)
    for single in (False, True)
    for as_text in (False, True)
    for nine in (False, True)
)


def probe_text() -> str:
    """A random word that no chat contains and that survives strip, escape and JSON encoding."""
    return f"sfi{secrets.token_hex(12)}sfi"


def probe_tool(name: str) -> dict[str, Any]:
    """The schema of a tool that exists only to be rendered."""
    text = {"type": "string", "description": "text"}
    parameters = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    function = {"name": name, "description": "A probe.", "parameters": parameters}
    return {"type": "function", "function": function}


class ChatTemplate:
    """The chat template of one tokenizer with the tools and options of one session.

    Args:
        tokenizer: Any tokenizer of transformers with a chat template.
        tools: Tool schemas as transformers takes them; empty for a chat without tools.
        options: Variables for the template, such as `{"enable_thinking": False}`.

    Raises:
        TemplateError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = tuple(tools)
        self.options = dict(options or {})
        self.source = _template_source(tokenizer, bool(tools))
        self.control_tokens = ControlTokens(tokenizer, self.source)
        self.form = self._find_form()

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The chat as text, in which control tokens of the messages are broken by separators.

        Use `encode` for its ids, or `control_tokens.plain` for the text itself.

        Raises:
            RenderFailure: The template raised.
        """
        return self._render_as(self.form, messages, generation_prompt, self.tools)

    def encode(self, rendered: str) -> list[int]:
        """Ids of text that `render` gave, or of a part of it."""
        return self.control_tokens.encode(rendered)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The whole chat as plain text, ready for the model's next turn.

        Raises:
            TemplateError: The template cannot render these messages.
        """
        return self.control_tokens.plain(self._render_prompt(messages))

    def first_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the whole chat, ready for the model's next turn.

        Raises:
            TemplateError: The template cannot render these messages.
        """
        return tuple(self.encode(self._render_prompt(messages)))

    def require_system(self) -> None:
        """Raise TemplateError unless a system message is rendered."""
        probe = probe_text()
        chat = [{"role": "system", "content": probe}, {"role": "user", "content": "u"}]
        self._require(chat, (probe,), "Use a system message", "Put it into the first user message")

    def require_tools(self) -> None:
        """Raise TemplateError unless tool definitions and tool results are rendered."""
        probe, user = probe_text(), {"role": "user", "content": "u"}
        remedy = "Use a checkpoint whose chat template supports tools, or open it without tools"
        self._require([user], (probe,), "Describe tools to the model", remedy, [probe_tool(probe)])
        self._require([*_tool_round(probe)], (probe,), "Give tool results to the model", remedy)

    def _render_prompt(self, messages: Sequence[Message]) -> str:
        try:
            return self.render(messages, generation_prompt=True)
        except RenderFailure as failure:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                explain(
                    "Render the chat with the tokenizer's template",
                    got=f"{failure} for the roles {roles}",
                    remedy="Give messages in an order and with roles that the model was made for",
                )
            ) from failure

    def _require(
        self,
        chat: Sequence[Message],
        probes: Sequence[str],
        attempted: str,
        remedy: str,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        try:
            text = self._render_as(self.form, chat, True, self.tools if tools is None else tools)
        except RenderFailure as failure:
            got = f"a chat template that refuses it ({failure})"
        else:
            if all(probe in text for probe in probes):
                return
            got = "a chat template that leaves it out without a word"
        raise TemplateError(explain(attempted, got=got, remedy=remedy))

    def _render_as(
        self,
        form: MessageForm,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> str:
        shaped = [self.control_tokens.protect(message) for message in _shape(messages, form)]
        try:
            text = self.tokenizer.apply_chat_template(
                shaped,
                tools=self.control_tokens.protect(tools) or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.options,
            )
        except Exception as error:
            # Templates raise jinja2 errors, TypeErrors and whatever their filters do.
            raise RenderFailure(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _find_form(self) -> MessageForm:
        # A form must render two calls and their results. Where none shows the results, tools are
        # unusable anyway and `require_tools` says so.
        first, second = probe_text(), probe_text()
        chat = _tool_round(first, second)
        for form in _FORMS:
            try:
                text = self._render_as(form, chat, True, self.tools)
            except RenderFailure:
                continue
            if first in text and second in text:
                return form
        return MessageForm()


def _template_source(tokenizer: PreTrainedTokenizerBase, with_tools: bool) -> str:
    try:
        # Some tokenizers have a second template for chats with tools.
        source = tokenizer.get_chat_template(None, [{}] if with_tools else None)
    except ValueError as error:
        raise TemplateError(
            explain(
                "Open a chat session",
                got=f"a tokenizer without a usable chat template ({error})",
                remedy="Set tokenizer.chat_template, or use session.decode with token ids",
            )
        ) from error
    return str(source)


def _tool_round(*results: str) -> list[dict[str, Any]]:
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": {}}}
        for number in range(len(results))
    ]
    for call in calls:
        call["function"] = {"name": "f", "arguments": {"text": "t"}}
    return [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *(
            {"role": "tool", "name": "f", "tool_call_id": call["id"], "content": result}
            for call, result in zip(calls, results, strict=True)
        ),
    ]


def _shape(messages: Sequence[Message], form: MessageForm) -> Iterator[dict[str, Any]]:
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls") or ()
        if form.one_call_per_turn and len(calls) > 1:
            results: list[Message] = []
            while index < len(messages) and messages[index].get("role") == "tool":
                results.append(messages[index])
                index += 1
            yield from (_shape_one(part, form) for part in _one_by_one(message, results))
        else:
            yield _shape_one(message, form)


def _one_by_one(message: Message, results: Sequence[Message]) -> Iterator[Message]:
    """One assistant message per call, each followed by its result."""
    waiting = list(results)
    for number, call in enumerate(message["tool_calls"]):
        content = message.get("content") if number == 0 else ""
        yield {**message, "content": content, "tool_calls": [call]}
        for result in [item for item in waiting if item.get("tool_call_id") == call.get("id")]:
            waiting.remove(result)
            yield result
    yield from waiting


def _shape_one(message: Message, form: MessageForm) -> dict[str, Any]:
    shaped = dict(message)
    if message.get("tool_calls"):
        shaped["tool_calls"] = [_shape_call(call, form) for call in message["tool_calls"]]
    if form.nine_character_ids and message.get("tool_call_id"):
        shaped["tool_call_id"] = _nine_characters(message["tool_call_id"])
    return shaped


def _shape_call(call: Mapping[str, Any], form: MessageForm) -> dict[str, Any]:
    import json

    shaped, function = dict(call), dict(call["function"])
    if form.arguments_as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    if form.nine_character_ids and "id" in shaped:
        shaped["id"] = _nine_characters(shaped["id"])
    return {**shaped, "function": function}


def _nine_characters(call_id: str) -> str:
    match = re.fullmatch(r"call_(\d{1,5})", call_id)
    return f"call{int(match[1]):05d}" if match else sha256(call_id.encode()).hexdigest()[:9]
