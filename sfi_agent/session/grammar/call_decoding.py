"""How a session's tool calls are decoded: exactly, held to their schemas, or neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from sfi_agent.config import SessionConfig
from sfi_agent.engine.token_watch import TokenWatch
from sfi_agent.errors import ConfigError, explain
from sfi_agent.observe.trace import StepRecord
from sfi_agent.session.chat import Chat
from sfi_agent.session.grammar.call_forms import call_forms
from sfi_agent.session.grammar.call_watch import CallWatch
from sfi_agent.session.grammar.held_calls import HeldCalls
from sfi_agent.session.grammar.xgrammar_calls import XGrammarCompiler
from sfi_agent.session.output.output_reader import OutputFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sfi_agent.session.engine import Engine

__all__ = ["WatchMaker", "watch_maker"]

WatchMaker: TypeAlias = Callable[[Sequence[StepRecord]], TokenWatch]
"""Makes the watch of one decoding from the records of all generated tokens."""

_ATTEMPTED = "opened a session with tools.constrain_calls"
_MOST_KEPT = 8
_held_calls: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, HeldCalls]] = WeakKeyDictionary()
"""Grammars take long to make, and sessions with the same tools can share them."""


def watch_maker(engine: Engine, config: SessionConfig, chat: Chat | None) -> WatchMaker | None:
    """What follows the tool calls of a session; None where there is nothing to follow.

    Raises:
        ConfigError: Calls are to be held to their schemas and cannot be: there are no tools, the
            model's call format is not one that is known for it, or its tokenizer is in the way.
        MissingExtraError: The library for it is not installed.
        ToolDefinitionError: A tool's schema cannot be made into a grammar.
    """
    settings, tokenizer = config.tools, engine.tokenizer
    if chat is None or tokenizer is None or not len(chat.tools):
        if settings.constrain_calls:
            raise ConfigError(
                explain(
                    _ATTEMPTED,
                    got="a session without tools",
                    remedy="give it tools, or set it false",
                )
            )
        return None
    output_format = chat.output_format
    held = _held(engine, tokenizer, chat) if settings.constrain_calls else None
    exact = settings.decode_calls == "exact"
    if held is None and not (exact and config.mode == "slow_fast" and config.slow_step != "verify"):
        return None

    def make(trace: Sequence[StepRecord]) -> TokenWatch:
        return CallWatch(tokenizer, output_format, trace, exact=exact, held_calls=held)

    return make


def _held(engine: Engine, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> HeldCalls:
    """The grammar of the session's calls, kept for sessions with the same tools."""
    shape, output_format = engine.shape, chat.output_format
    key = (
        chat.tools.canonical_json,
        output_format.template_source,
        output_format.hidden_ids,
        chat.stop_ids,
        shape.vocabulary_size,
        shape.device,
    )
    known = _held_calls.setdefault(tokenizer, {})
    if key not in known:
        made = _make(engine, tokenizer, chat)
        if len(known) >= _MOST_KEPT:
            del known[next(iter(known))]
        known[key] = made
    return known[key]


def _make(engine: Engine, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> HeldCalls:
    output_format = chat.output_format
    stops = {str(tokenizer.decode([index])) for index in chat.stop_ids}
    forms = call_forms(
        output_format.call_format,
        output_format.call_style,
        output_format.template_source,
        stops,
        first_closing_ends=output_format.name == "response_template",
    )
    name = chat.tools.names[0]
    if not forms:
        raise _not_held("a chat template whose call format is not known for it")
    for form in forms:
        if not _reads(output_format, "".join(form.sample(name)), name):
            raise _not_held(f"a format whose calls are read otherwise than {form.sample(name)!r}")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    compiler = XGrammarCompiler(
        tokenizer,
        engine.shape.vocabulary_size,
        chat.stop_ids,
        output_format.hidden_ids,
        frozenset(special) - output_format.hidden_ids,
    )
    schemas = {
        schema["function"]["name"]: schema["function"]["parameters"]
        for schema in chat.tools.schemas
    }
    held = HeldCalls(compiler, forms, schemas, engine.shape.device)
    for form in forms:
        watch = CallWatch(tokenizer, output_format, (), exact=False, held_calls=held)
        watch.start([])
        for token_id in tokenizer.encode(form.sample(name)[0], add_special_tokens=False):
            watch.note(token_id)
        if not watch.holds:
            raise _not_held(f"a {type(tokenizer).__name__} that does not write calls as text")
    return held


def _reads(output_format: OutputFormat, text: str, name: str) -> bool:
    """Whether the text is the sample call of the tool to whoever reads the output."""
    reader = output_format.reader()
    reader.feed_text(text)
    reader.finish()
    calls = reader.parsed.calls
    return [(call.name, dict(call.arguments), call.error) for call in calls] == [
        (name, {"a": "b"}, None)
    ]


def _not_held(got: str) -> ConfigError:
    return ConfigError(
        explain(
            _ATTEMPTED,
            got=got,
            allowed="the formats and tokenizers listed in docs/tool_calls.md",
            remedy="leave tools.constrain_calls false with this checkpoint",
        )
    )
