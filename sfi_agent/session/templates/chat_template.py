"""A tokenizer's chat template: rendering messages to text and ids, with what it cannot do named.

Chat templates are programs from outside. They differ in what they take for a tool call, may raise
anything, and may leave out what they do not know. This module finds out by rendering probes, never
by the name of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import TemplateError, explain
from sfi_agent.session.templates.control_tokens import ControlTokens
from sfi_agent.session.templates.form_search import (
    FormSearch,
    probe_text,
    tool_round,
    user_message,
)
from sfi_agent.session.templates.message_form import Message, MessageForm, shape_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Message", "MessageForm", "RenderFailure", "probe_text", "probe_tool"]

_CLOCK = "strftime_now"
_ORDER_REMEDY = "Give messages in an order and with roles that the model was made for"
_TOOLS_REMEDY = (
    "Use a checkpoint whose chat template supports tools, set tokenizer.chat_template to one for "
    "this model that does (definitions, calls and results), or open the session without tools"
)


class RenderFailure(Exception):
    """The template raised while rendering. Internal: callers turn it into what it means to them.

    Attributes:
        remedy: What the user may do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.remedy = remedy


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

    Attributes:
        source: The template, as it was when this object was made: another one that the tokenizer
            gets later has no effect.
        form: How it wants its messages.
        opening: What a chat must begin with for this template to take it: a system message, or
            nothing. Probes begin with it.

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
        search = FormSearch(self._try_render)
        self.form, self.opening = search.form, search.opening

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        """The chat as text, in which control tokens of the messages are broken by separators.

        Use `encode` for its ids, or `control_tokens.plain` for the text itself.

        Raises:
            RenderFailure: The template raised, or it changes text in which control tokens stand.
        """
        tokens = self.control_tokens
        text, broken = self._render_with(tokens, self.form, messages, generation_prompt)
        if broken:
            # A template that cuts or recases text would leave pieces of the separators in it.
            others = tokens.with_other_separator()
            again, _ = self._render_with(others, self.form, messages, generation_prompt)
            if others.plain(again) != tokens.plain(text):
                raise RenderFailure(
                    "it changes texts, and control tokens stand in one", "Remove them from the text"
                )
        return text

    def writes_the_date(self, messages: Sequence[Message]) -> bool:
        """Whether what is rendered depends on the day on which it is rendered."""
        if _CLOCK not in self.source:
            return False
        texts = set()
        for date in ("2001-02-03", "2012-11-10"):
            # What a template defines itself comes before what it is given.
            source = f"{{%- macro {_CLOCK}(form) -%}}{date}{{%- endmacro -%}}{self.source}"
            try:
                texts.add(
                    self._render_with(
                        self.control_tokens, self.form, messages, True, source=source
                    )[0]
                )
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
        chat = [_system(probe), user_message("u")]
        problem = self._problem(chat, probe, self.tools)
        if problem is not None:
            remedy = "Put it into the first user message"
            raise TemplateError(explain("Use a system message", got=problem, remedy=remedy))

    def require_tools(self, *, beside_system: bool = False) -> None:
        """Raise TemplateError unless tool definitions and tool results are rendered.

        Args:
            beside_system: The chat has a system message. Some templates show only one of the two.
        """
        opening = (_system("s"),) if beside_system else self.opening
        probe = probe_text()
        problem = self._problem([*opening, user_message("u")], probe, [probe_tool(probe)])
        if problem is not None:
            attempted = "Describe tools to the model"
            if beside_system:
                attempted += " beside a system message"
            raise TemplateError(explain(attempted, got=problem, remedy=_TOOLS_REMEDY))
        problem = self.tool_results_problem(opening)
        if problem is not None:
            raise TemplateError(
                explain("Give tool results to the model", got=problem, remedy=_TOOLS_REMEDY)
            )

    def tool_results_problem(self, opening: Sequence[Message] | None = None) -> str | None:
        """What becomes of a tool result that should be rendered; None if it is."""
        probe = probe_text()
        chat = [*(self.opening if opening is None else opening), *tool_round(("t",), (probe,))]
        return self._problem(chat, probe, self.tools)

    def require_contents(self, messages: Sequence[Message], new: int) -> None:
        """Raise TemplateError if the model would not see one of the last messages.

        Args:
            messages: A chat that can be rendered.
            new: How many of them have not been rendered before. What a template leaves out of
                earlier turns is its own business.
        """
        chat = list(messages)
        shown = [
            index
            for index in range(len(chat) - new, len(chat))
            if chat[index]["role"] != "assistant" and str(chat[index]["content"]).strip()
        ]
        probes = {index: probe_text() for index in shown}
        for index, probe in probes.items():
            chat[index] = {**chat[index], "content": probe}
        text = self._try_render(self.form, chat, True)
        for index in (
            [] if text is None else [i for i, probe in probes.items() if probe not in text]
        ):
            # It may also be shown in another way, in capitals for example.
            other = [*chat[:index], {**chat[index], "content": probe_text()}, *chat[index + 1 :]]
            if self._try_render(self.form, other, True) == text:
                raise TemplateError(
                    explain(
                        "Show messages to the model",
                        got=f"a chat template that leaves message {index} of {len(chat)}, of role "
                        f"{chat[index]['role']}, out without a word",
                        remedy="Put its text into another message",
                    )
                )

    def _render_prompt(self, messages: Sequence[Message]) -> str:
        try:
            return self.render(messages, generation_prompt=True)
        except RenderFailure as failure:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                explain(
                    "Render the chat with the tokenizer's template",
                    got=f"{failure} for the roles {roles}",
                    remedy=failure.remedy,
                )
            ) from failure

    def _problem(
        self, chat: Sequence[Message], probe: str, tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        try:
            text, _ = self._render_with(self.control_tokens, self.form, chat, True, tools)
        except RenderFailure as failure:
            return f"a chat template that refuses it ({failure})"
        return None if probe in text else "a chat template that leaves it out without a word"

    def _try_render(
        self, form: MessageForm, chat: Sequence[Message], generation_prompt: bool
    ) -> str | None:
        try:
            return self._render_with(self.control_tokens, form, chat, generation_prompt)[0]
        except RenderFailure:
            return None

    def _render_with(
        self,
        tokens: ControlTokens,
        form: MessageForm,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        source: str | None = None,
    ) -> tuple[str, bool]:
        """The rendered text, and whether separators were put in."""
        shaped = list(shape_messages(messages, form))
        described = list(self.tools if tools is None else tools)
        protected = [{**tokens.protect(item), "role": item["role"]} for item in shaped]
        protected_tools = tokens.protect(described)
        try:
            text = self.tokenizer.apply_chat_template(
                protected,
                tools=protected_tools or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                chat_template=source or self.source,
                **self.options,
            )
        except Exception as error:
            # Templates raise jinja2 errors, TypeErrors and whatever their filters do.
            problem = f"{type(error).__name__}: {error}"
            raise RenderFailure(problem, _ORDER_REMEDY) from error
        assert isinstance(text, str)
        return text, protected != shaped or protected_tools != described


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


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}
