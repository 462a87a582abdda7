"""Chats, tools and tokenizers that several tests of the text side share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent.session.events import ToolCall
from sfi_agent.session.templates.chat_delta import ChatDelta
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.stop_ids import stop_ids
from tests import chat_templates
from tests.tiny_tokenizers import chatml_tokenizer

SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the notes.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look for."}},
            "required": ["query"],
        },
    },
}

FAMILIES: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "CHATML": ((), "<|im_end|>", None),
    "CHATML_THINKING": ((), "<|im_end|>", None),
    "LLAMA": (chat_templates.LLAMA_SPECIAL_TOKENS, "<|eot_id|>", "<|begin_of_text|>"),
    "MISTRAL": (chat_templates.MISTRAL_SPECIAL_TOKENS, "</s>", "<s>"),
    "GEMMA": (chat_templates.GEMMA_SPECIAL_TOKENS, "<end_of_turn>", "<bos>"),
    "DROPS_TOOL_MESSAGES": ((), "<|im_end|>", None),
    "CHANGES_THE_CLOSE": ((), "<|im_end|>", None),
    "CHANGES_THE_STOP": ((), "<|im_end|>", None),
    "ARGUMENTS_AS_TEXT": ((), "<|im_end|>", None),
    "ROLE_OPENS_NEXT_TURN": (chat_templates.ROLE_SPECIAL_TOKENS, "<|user|>", None),
    "NO_CONTROL_TOKENS": ((), "<|im_end|>", None),
}
"""Special tokens, end of sequence and start of sequence, by name of the template."""


@dataclass(frozen=True)
class Chat:
    """One family's tokenizer, template and delta."""

    tokenizer: Any
    template: ChatTemplate
    delta: ChatDelta
    stops: frozenset[int]

    def model_output(
        self, messages: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]
    ) -> list[int]:
        """Ids of an answer as the template itself would write it, without its stop token."""
        before = self.template.render(messages, generation_prompt=True)
        after = self.template.render([*messages, answer], generation_prompt=False)
        assert after.startswith(before)
        text = after[len(before) :]
        for token, index in self.template.control_tokens.ids.items():
            if index in self.stops:
                text = text.partition(token)[0]
        return self.template.encode(text)

    def ids(self, *tokens: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]


def make_chat(
    family: str, tools: Sequence[Mapping[str, Any]] = (), extra_stops: Sequence[str] = ()
) -> Chat:
    special, eos, bos = FAMILIES[family]
    source = getattr(chat_templates, family)
    tokenizer = chatml_tokenizer(source, special_tokens=special, eos_token=eos, bos_token=bos)
    template = ChatTemplate(tokenizer, tools)
    stops = stop_ids(tokenizer) | {tokenizer.convert_tokens_to_ids(name) for name in extra_stops}
    return Chat(tokenizer, template, ChatDelta(template, stops), stops)


def call(number: int = 0, name: str = "search", **arguments: Any) -> ToolCall:
    return ToolCall(f"call_{number}", name, arguments, "")


def call_message(*calls: ToolCall, content: str = "") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "id": item.id,
                "type": "function",
                "function": {"name": item.name, "arguments": dict(item.arguments)},
            }
            for item in calls
        ],
    }


def result(content: str, number: int = 0, name: str = "search") -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": f"call_{number}", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
