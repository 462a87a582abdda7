"""Chats, outputs and engines with published chat templates and those of `call_templates`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
from transformers import GenerationConfig

from sfi_agent import Engine
from sfi_agent.session.output.output_reader import OutputFormat, OutputReader
from sfi_agent.session.output.text_stream import TextStream
from sfi_agent.session.templates.chat_delta import ChatDelta
from sfi_agent.session.templates.chat_template import ChatTemplate
from sfi_agent.session.templates.stop_ids import stop_ids
from tests.call_templates import CALL_TEMPLATES
from tests.families import FAMILIES, build_model
from tests.published_templates import (
    PUBLISHED,
    family_of,
    needs_published_templates,
    tokenizer_of,
)
from tests.test_session import conversations
from tests.test_session.helpers import Chat, user
from tests.tiny_tokenizers import chatml_tokenizer

__all__ = [
    "Writer",
    "Written",
    "chat_of",
    "model_output",
    "named",
    "published_engine",
    "stops_of",
    "writer_of",
]


def named(names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test; those of published templates need them installed."""
    return [
        pytest.param(name, marks=needs_published_templates) if name in PUBLISHED else name
        for name in names
    ]


@lru_cache
def _tokenizer(name: str) -> Any:
    if name in PUBLISHED:
        return tokenizer_of(name)
    made = CALL_TEMPLATES[name]
    return chatml_tokenizer(made.source, special_tokens=made.special)


def stops_of(name: str) -> list[int]:
    """What the generation configuration of such checkpoints ends a turn on."""
    tokenizer = _tokenizer(name)
    more = family_of(name).stops if name in PUBLISHED else ()
    return [int(tokenizer.convert_tokens_to_ids(text)) for text in (tokenizer.eos_token, *more)]


def chat_of(name: str, tools: Sequence[Mapping[str, Any]] = ()) -> Chat:
    """A template with its tokenizer, its delta and its stop tokens."""
    tokenizer = _tokenizer(name)
    stops = stop_ids(tokenizer, GenerationConfig(eos_token_id=stops_of(name)))
    template = ChatTemplate(tokenizer, tools)
    return Chat(tokenizer, template, ChatDelta(template, stops), stops)


def model_output(
    chat: Chat, begun: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]
) -> tuple[str, list[int]]:
    """The prompt as far as the template writes the same with the answer behind it, and the ids of
    the answer as it writes them, up to its stop token."""
    before = chat.template.render(begun, generation_prompt=True)
    after = chat.template.render([*begun, answer], generation_prompt=False)
    tokens = chat.template.control_tokens
    shared = tokens.shared(before, after)
    ids = chat.tokenizer.encode(tokens.plain(after[shared:]), add_special_tokens=False)
    ends = [place for place, index in enumerate(ids) if index in chat.stops]
    return tokens.plain(before[:shared]), ids[: ends[0] if ends else None]


@dataclass(frozen=True)
class Written:
    """A model's output as a template would write it.

    Attributes:
        prompt: Text before it.
        pieces: Its tokens as text; "" for those that are no part of any text.
    """

    prompt: str
    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True)
class Writer:
    """One template with what reads its outputs."""

    chat: Chat
    format: OutputFormat

    @property
    def template(self) -> ChatTemplate:
        return self.chat.template

    def reader(self, prompt: str) -> OutputReader:
        return self.format.reader(prompt)

    def write(self, answer: Mapping[str, Any]) -> Written:
        prompt, ids = model_output(self.chat, [user("Go")], answer)
        stream = TextStream(self.chat.tokenizer)
        texts = [(index, stream.push(index)) for index in ids]
        hidden = self.format.hidden_ids
        return Written(prompt, tuple("" if index in hidden else text for index, text in texts))


def writer_of(name: str, tools: Sequence[Mapping[str, Any]]) -> Writer:
    """A template with tools, and its reader."""
    chat = chat_of(name, tools)
    return Writer(chat, OutputFormat(chat.tokenizer, chat.template.source, tools, chat.stops))


@lru_cache
def published_engine(name: str) -> Engine:
    """A tiny real model behind a published template. Shared: leave it as it is."""
    tokenizer = tokenizer_of(name)
    model = build_model(
        next(item for item in FAMILIES if item.name == "qwen2"),
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=stops_of(name),
        pad_token_id=None,
    )
    engine = Engine(model, tokenizer)
    conversations._TWINS[engine] = deepcopy(model)
    return engine
