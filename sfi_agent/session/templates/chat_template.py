"""A tokenizer's chat template: rendering messages to text and ids, with what it cannot do named.

Chat templates are programs from outside. They differ in what they take for a tool call, may raise
anything, and may leave out what they do not know. This module finds out by rendering probes, never
by the name of a model.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import TemplateError, explain
from sfi_agent.session.templates.control_tokens import ControlTokens
from sfi_agent.session.templates.message_form import (
    CALL_FORMS,
    REASONING_KEYS,
    Message,
    MessageForm,
    shape_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Message", "MessageForm", "RenderFailure", "probe_text", "probe_tool"]

_CLOCK = "strftime_now"


class RenderFailure(Exception):
    """The template raised while rendering. Internal: callers turn it into what it means to them."""


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

    def writes_the_date(self, messages: Sequence[Message]) -> bool:
        """Whether what is rendered depends on the day on which it is rendered."""
        if _CLOCK not in self.source:
            return False
        texts = set()
        for date in ("2001-02-03", "2012-11-10"):
            # What a template defines itself comes before what it is given.
            source = f"{{%- macro {_CLOCK}(form) -%}}{date}{{%- endmacro -%}}{self.source}"
            try:
                texts.add(self._render_as(self.form, messages, True, self.tools, source))
            except RenderFailure:
                return False
        return len(texts) > 1

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
        chat = [{"role": "system", "content": probe}, _user("u")]
        problem = self._problem(chat, probe, self.tools)
        if problem is not None:
            remedy = "Put it into the first user message"
            raise TemplateError(explain("Use a system message", got=problem, remedy=remedy))

    def require_tools(self) -> None:
        """Raise TemplateError unless tool definitions and tool results are rendered."""
        probe = probe_text()
        remedy = "Use a checkpoint whose chat template supports tools, or open it without tools"
        problem = self._problem([_user("u")], probe, [probe_tool(probe)])
        if problem is not None:
            raise TemplateError(explain("Describe tools to the model", got=problem, remedy=remedy))
        problem = self.tool_results_problem()
        if problem is not None:
            raise TemplateError(
                explain("Give tool results to the model", got=problem, remedy=remedy)
            )

    def tool_results_problem(self) -> str | None:
        """What becomes of a tool result that should be rendered; None if it is."""
        probe = probe_text()
        return self._problem(_tool_round(("t",), (probe,)), probe, self.tools)

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

    def _problem(
        self, chat: Sequence[Message], probe: str, tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        try:
            text = self._render_as(self.form, chat, True, tools)
        except RenderFailure as failure:
            return f"a chat template that refuses it ({failure})"
        return None if probe in text else "a chat template that leaves it out without a word"

    def _render_as(
        self,
        form: MessageForm,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]],
        source: str | None = None,
    ) -> str:
        shaped = [
            self.control_tokens.protect(message) for message in shape_messages(messages, form)
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                shaped,
                tools=self.control_tokens.protect(tools) or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                chat_template=source,
                **self.options,
            )
        except Exception as error:
            # Templates raise jinja2 errors, TypeErrors and whatever their filters do.
            raise RenderFailure(f"{type(error).__name__}: {error}") from error
        assert isinstance(text, str)
        return text

    def _find_form(self) -> MessageForm:
        user = probe_text()
        parts = self._text_as(MessageForm(), [_user(user)])
        form = MessageForm(content_as_parts=parts is None or user not in parts)
        return self._with_reasoning_form(self._with_call_form(form))

    def _with_call_form(self, form: MessageForm) -> MessageForm:
        # The right form shows two calls and their results. Where no form shows the results, tools
        # are unusable anyway and `require_tools` says so.
        calls, results = (probe_text(), probe_text()), (probe_text(), probe_text())
        second_best = None
        for as_text, nine, single in CALL_FORMS:
            tried = replace(
                form,
                arguments_as_text=as_text,
                nine_character_ids=nine,
                one_call_per_turn=single,
            )
            text = self._text_as(tried, _tool_round(calls, results))
            if text is None or not all(probe in text for probe in results):
                continue
            if all(probe in text for probe in calls):
                return tried
            second_best = second_best or tried
        return second_best or form

    def _with_reasoning_form(self, form: MessageForm) -> MessageForm:
        for key in REASONING_KEYS:
            tried = replace(form, reasoning_key=key)
            beside_text = self._shows_reasoning(tried, calls=False, content="t")
            beside_calls = self._shows_reasoning(tried, calls=True, content="")
            if beside_text or beside_calls:
                both = self._shows_reasoning(tried, calls=True, content="t")
                # None is a template that raises; one that only leaves reasoning out may have both.
                return replace(tried, text_or_reasoning=bool(beside_calls) and both is None)
        return form

    def _shows_reasoning(self, form: MessageForm, *, calls: bool, content: str) -> bool | None:
        """Whether the last message's reasoning is rendered; None if the template raises."""
        probe = probe_text()
        chat = _tool_round(("t",), ()) if calls else [_user("u"), {"role": "assistant"}]
        chat[-1] = {**chat[-1], "content": content, REASONING_KEYS[0]: probe}
        text = self._text_as(form, chat, generation_prompt=False)
        return None if text is None else probe in text

    def _text_as(
        self, form: MessageForm, chat: Sequence[Message], *, generation_prompt: bool = True
    ) -> str | None:
        try:
            return self._render_as(form, chat, generation_prompt, self.tools)
        except RenderFailure:
            return None


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


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _tool_round(arguments: Sequence[str], results: Sequence[str]) -> list[dict[str, Any]]:
    """A question, calls with one argument each, and the results of the first calls."""
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": value}}
        for number, value in enumerate({"text": argument} for argument in arguments)
    ]
    return [
        _user("u"),
        {"role": "assistant", "content": "", "tool_calls": calls},
        *(
            {"role": "tool", "name": "f", "tool_call_id": f"call_{number}", "content": result}
            for number, result in enumerate(results)
        ),
    ]
