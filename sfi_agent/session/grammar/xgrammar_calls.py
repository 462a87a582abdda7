"""Grammars of tool calls by xgrammar, which comes with the extra `grammar`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfi_agent.errors import ConfigError, MissingExtraError, ToolDefinitionError, explain
from sfi_agent.observe.log import log_event
from sfi_agent.session.grammar.argument_formats import (
    HeldArguments,
    argument_markup,
    held_arguments,
)
from sfi_agent.session.grammar.call_forms import CallForm, layout_pattern
from sfi_agent.session.grammar.grammar_formats import (
    Format,
    or_format,
    pattern_format,
    repeat_format,
    sequence_format,
    text_format,
)
from sfi_agent.session.grammar.utf8_tokens import Utf8Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["XGrammarCompiler"]

# xgrammar lets control characters into some strings.
_NOT_IN_JSON = re.compile(rb"[\x00-\x09\x0b-\x1f]")
_NOT_IN_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


class XGrammarCompiler:
    """See `GrammarCompiler`.

    Args:
        tokenizer: A tokenizer of transformers.
        vocabulary_size: Of the model, padding included.
        stop_ids: Tokens that end a turn.
        control_ids: Tokens that never belong to a call.
        markup_ids: Tokens that never belong to a text inside one.

    Raises:
        MissingExtraError: xgrammar is not installed.
        ConfigError: It cannot work with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int,
        stop_ids: frozenset[int],
        control_ids: frozenset[int],
        markup_ids: frozenset[int] = frozenset(),
    ) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise MissingExtraError(
                "opened a session with tools.constrain_calls", extra="grammar"
            ) from error
        self._library: Any = xgrammar
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary_size, stop_token_ids=sorted(stop_ids) or None
            )
            self._compiler = xgrammar.GrammarCompiler(info)
        except Exception as error:
            # Tokenizers come in kinds that it does not know, and each fails in its own way.
            raise ConfigError(
                explain(
                    "opened a session with tools.constrain_calls",
                    got=f"a {type(tokenizer).__name__} that xgrammar cannot take: {error}",
                    remedy="leave tools.constrain_calls false with this tokenizer",
                )
            ) from error
        self._token_bytes: list[bytes] = list(info.decoded_vocab)
        self._utf8_tokens = Utf8Tokens(self._token_bytes)
        self._control_ids = [index for index in control_ids - stop_ids if index < vocabulary_size]
        self._markup_ids = [index for index in markup_ids - stop_ids if index < vocabulary_size]

    @property
    def token_bytes(self) -> Sequence[bytes]:
        return self._token_bytes

    def compile(
        self, form: CallForm, schemas: Mapping[str, Mapping[str, Any]]
    ) -> XGrammarCallGrammar:
        """See `GrammarCompiler`."""
        excluded = [form.closing] if form.first_closing_ends and form.closing else []
        held: dict[str, HeldArguments] = {}
        for name, schema in schemas.items():
            held[name] = held_arguments(form.arguments, schema, excluded)
            self._compiled(form, {name: held[name]}, f"tool {name!r}")
            if keywords := sorted(held[name].not_held):
                log_event("warning", "schema_partly_held", tool=name, keywords=keywords)
        compiled = self._compiled(form, held, f"tools {', '.join(schemas)}")
        barred = _NOT_IN_JSON if form.arguments == "json" else _NOT_IN_TEXT
        texts, closing = self._token_bytes, form.closing.encode()
        never = torch.tensor([barred.search(text) is not None for text in texts])
        never[self._control_ids] = True
        closing_ids = [index for index, text in enumerate(texts) if text and text == closing]
        markup = torch.zeros(len(texts), dtype=torch.bool)
        own = argument_markup(form.arguments)
        markup[[index for index in self._markup_ids if texts[index] not in own]] = True
        markup[closing_ids] = False
        return XGrammarCallGrammar(
            self._library, compiled, never, markup, closing_ids, texts, self._utf8_tokens
        )

    def _compiled(self, form: CallForm, held: Mapping[str, HeldArguments], what: str) -> Any:
        tag = {"type": "structural_tag", "format": _call_format(form, held)}
        try:
            return self._compiler.compile_structural_tag(json.dumps(tag))
        except Exception as error:
            raise ToolDefinitionError(
                explain(
                    f"Hold the calls of {what} to their JSON schema",
                    got=f"a schema that xgrammar cannot take: {error}",
                    remedy="Simplify the schema, or leave tools.constrain_calls false",
                )
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class XGrammarCallGrammar:
    """See `CallGrammar`.

    Attributes:
        library: The module.
        compiled: The grammar, for any number of matchers.
        never: Tokens that are never allowed, `[vocabulary]` bool.
        markup: Tokens that are not allowed in a text, `[vocabulary]` bool.
        closing_ids: Tokens whose text is the form's closing.
        token_bytes: Of the compiler.
        utf8_tokens: Of its tokens: xgrammar lets bytes into texts that are no characters.
    """

    library: Any
    compiled: Any
    never: Tensor
    markup: Tensor
    closing_ids: Sequence[int]
    token_bytes: Sequence[bytes]
    utf8_tokens: Utf8Tokens

    def matcher(self) -> XGrammarCallMatcher:
        """See `CallGrammar`."""
        return XGrammarCallMatcher(self, self.library.GrammarMatcher(self.compiled), [])


class XGrammarCallMatcher:
    """See `CallMatcher`.

    Args:
        grammar: Its grammar.
        inner: xgrammar's matcher.
        open_ends: Behind every step the beginning of a character that the text ends with.
    """

    def __init__(self, grammar: XGrammarCallGrammar, inner: Any, open_ends: list[bytes]) -> None:
        self._grammar = grammar
        self._inner = inner
        self._open_ends = open_ends

    @property
    def steps(self) -> int:
        """See `CallMatcher`."""
        return len(self._open_ends)

    def allowed(self) -> Tensor:
        """See `CallMatcher`."""
        grammar = self._grammar
        size = len(grammar.never)
        words = grammar.library.allocate_token_bitmask(1, size)
        self._inner.fill_next_token_bitmask(words)
        bits = (words[0][:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        allowed: Tensor = bits.bool().flatten()[:size] & ~grammar.never
        allowed &= grammar.utf8_tokens.allowed_behind(self._open_end)
        if bool((allowed & grammar.markup).any()) and self._in_text():
            allowed &= ~grammar.markup
        for token_id in grammar.closing_ids:
            # As text it may stand in a string as well, where readers would take it for the end.
            if allowed[token_id] and not self._ends_with(token_id):
                allowed[token_id] = False
        return allowed

    def advance(self, token_id: int) -> bool:
        """See `CallMatcher`."""
        text = self._grammar.token_bytes[token_id]
        if not self._grammar.utf8_tokens.allowed_behind(self._open_end)[token_id]:
            return False
        return self._note(text, bool(self._inner.accept_token(token_id)))

    def advance_text(self, text: bytes) -> bool:
        """See `CallMatcher`."""
        return not text or self._note(text, bool(self._inner.accept_string(text)))

    def rollback(self, steps: int) -> None:
        """See `CallMatcher`."""
        if steps:
            self._inner.rollback(steps)
            del self._open_ends[-steps:]

    def fork(self) -> XGrammarCallMatcher:
        """See `CallMatcher`."""
        return XGrammarCallMatcher(self._grammar, self._inner.fork(), list(self._open_ends))

    @property
    def _open_end(self) -> bytes:
        return self._open_ends[-1] if self._open_ends else b""

    def _note(self, text: bytes, taken: bool) -> bool:
        if taken:
            self._open_ends.append(Utf8Tokens.open_end(self._open_end + text))
        return taken

    def _in_text(self) -> bool:
        """Whether anything may be written here, and not only what the form says."""
        if not self._inner.accept_string("z"):
            return False
        self._inner.rollback(1)
        return True

    def _ends_with(self, token_id: int) -> bool:
        """Whether this token would complete the call."""
        if not self._inner.accept_token(token_id):
            return False
        ends = bool(self._inner.is_completed())
        self._inner.rollback(1)
        return ends


def _call_format(form: CallForm, held: Mapping[str, HeldArguments]) -> Format:
    """What comes behind the form's opening, as a structural tag's format."""
    parts = [_layout(form.start), _any_call(form, form.before, held)]
    if form.between is not None:
        again = _any_call(form, form.again or form.before, held)
        more = sequence_format([_layout(form.between), again])
        parts.append(repeat_format(more, 0, None))
    parts.append(_layout(form.end))
    if form.closing:
        # Behind the closing anything may come, so that a token may reach beyond it.
        parts += [{"type": "const_string", "value": form.closing}, text_format(())]
    return sequence_format(parts)


def _any_call(form: CallForm, before: str, held: Mapping[str, HeldArguments]) -> Format:
    return or_format(
        [
            sequence_format([_layout(before, name), one.format, _layout(form.after, name)])
            for name, one in held.items()
        ]
    )


def _layout(layout: str, tool_name: str = "") -> Format:
    return pattern_format(layout_pattern(layout, tool_name))
