"""Conversations without a model: the chat side of a session, whose outputs the test writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from transformers import GenerationConfig

from sfi_agent.session.chat import Chat
from sfi_agent.session.output.output_reader import parse_output
from sfi_agent.session.turn_plan import TurnPlan
from sfi_agent.session.user_input import UserInput
from tests.odd_templates import ODD, ODD_SPECIAL_TOKENS
from tests.tiny_tokenizers import chatml_tokenizer

__all__ = ["Talk", "call_output", "look_up", "odd_tokenizer", "talk_with"]


def look_up(query: str, times: int = 1) -> str:
    """Looks something up.

    Args:
        query: What to look for.
        times: How often.
    """
    return query * times


def odd_tokenizer(name: str) -> Any:
    """A tokenizer with one of the odd templates."""
    return chatml_tokenizer(ODD[name], special_tokens=ODD_SPECIAL_TOKENS)


def call_output(**arguments: Any) -> str:
    """A call as the odd templates write it."""
    shown = ", ".join(f'"{key}": "{value}"' for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "look_up", "arguments": {{{shown}}}}}\n</tool_call>'


class Talk:
    """One conversation.

    Args:
        tokenizer: With a chat template.
        stops: What the generation configuration ends a turn on.
        system: System prompt.
        tools: Tools.
        reasoning: See `HistorySettings`.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[int],
        system: str | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        reasoning: Literal["keep", "template"] = "keep",
    ) -> None:
        self.tokenizer = tokenizer
        config = GenerationConfig(eos_token_id=list(stops))
        self.chat = Chat(tokenizer, config, system, tools, reasoning)

    @property
    def template(self) -> Any:
        return self.chat._template

    @property
    def ids(self) -> list[int]:
        return list(self.chat.transcript.token_ids)

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.ids))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def ask(self, given: UserInput) -> TurnPlan:
        """The user, or a tool, speaks."""
        plan = self.chat.plan(given)
        self.chat.begin(plan)
        return plan

    def answer(self, plan: TurnPlan, ids: Sequence[int]) -> None:
        """The model speaks."""
        parsed = parse_output(
            self.chat.output_format,
            self.tokenizer,
            ids,
            prompt_text=plan.prompt_text,
            first_call_number=self.chat.transcript.calls_seen,
        )
        self.chat.end(ids, parsed)

    def turn(self, given: UserInput, output: str) -> TurnPlan:
        """Both; the output is a text with its stop token."""
        plan = self.ask(given)
        self.answer(plan, self.encode(output))
        return plan

    def rendered(self, messages: Sequence[Any]) -> list[int]:
        """A chat as the template writes it."""
        return list(self.template.first_prompt(messages))


def talk_with(source: str, **keywords: Any) -> Talk:
    """A conversation over a template's source, that ends turns on `<|im_end|>`."""
    tokenizer = chatml_tokenizer(source, special_tokens=ODD_SPECIAL_TOKENS)
    return Talk(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")], **keywords)
