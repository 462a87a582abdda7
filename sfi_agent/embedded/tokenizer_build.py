"""Builds the embedded tokenizer: the words of the world as single tokens, bytes for the rest.

Pre-tokens are a word with the space before it, a number of three digits after a space, one
digit, a run of punctuation marks with the space before it, or one white-space character. Every
pre-token of the world is in the vocabulary and is taken whole; any other is written as bytes, so
any text can be encoded and decoding gives it back. Nothing is learned from counts: a trained BPE
would spend a fifth of the vocabulary on halves of words.

Run: python -m sfi_agent.embedded.tokenizer_build DIR
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfi_agent.embedded import chat_format, lexicon, log_style
from sfi_agent.embedded.documents import OPENED, SYSTEM_SENTENCES, tool_schemas
from sfi_agent.embedded.questions import KINDS, make_turn
from sfi_agent.embedded.world import VARIANTS, make_office

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["build_tokenizer"]

_PATTERN = r" ?\p{L}+| [1-9][0-9]{2}(?!\p{N})|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_CONTROL = (chat_format.END_OF_TEXT, chat_format.MESSAGE_OPEN, chat_format.MESSAGE_CLOSE)
_SAMPLE_OFFICES = 60


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer and wrap it with its chat and response templates.

    Deterministic: the same code gives the same vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = _splitter()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word for text in _texts() for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {word: index for index, word in enumerate((*_CONTROL, *alphabet))}
    for word in sorted(words - set(vocabulary)):
        vocabulary[word] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in _CONTROL])
    core.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in chat_format.KEPT_TOKENS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=chat_format.MESSAGE_CLOSE,
        pad_token=chat_format.END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=16384,
    )
    tokenizer.chat_template = chat_format.CHAT_TEMPLATE
    tokenizer.response_template = chat_format.RESPONSE_TEMPLATE
    return tokenizer


def _splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _texts() -> Iterator[str]:
    """Every word of the world: closed lists first, then forms as they occur in samples."""
    fields = (*lexicon.PERSON_FIELDS, *lexicon.PROJECT_FIELDS, *lexicon.RESULT_FIELDS)
    yield from (f" {name}" for name in (*lexicon.PERSON_NAMES, *lexicon.PROJECT_NAMES))
    yield from (f" {word}" for word in (*lexicon.NUMBERS, *lexicon.DAYS))
    yield from lexicon.DAYS
    for field in fields:
        yield "".join((*field.phrase, f" {field.noun}", *(f" {value}" for value in field.values)))
    yield from (*log_style.THINGS, *log_style.EVENTS, *log_style.TIMES, *log_style.ERRANDS)
    yield from (*log_style.PREFIXES, " Parcel arrived The", OPENED.replace("|", ""))
    yield from (*SYSTEM_SENTENCES, *(f" {sentence}" for sentence in SYSTEM_SENTENCES))
    yield from (chat_format.TOOLS_BEFORE, chat_format.TOOLS_AFTER, *tool_schemas().values())
    yield "system\nuser\nassistant\nOpen the log"
    rng = random.Random("tokenizer")
    for index in range(_SAMPLE_OFFICES):
        office = make_office(rng, VARIANTS[index % 2], 400, required=frozenset({"badge", "room"}))
        yield office.log
        for kind in KINDS:
            turn = make_turn(rng, office, kind)
            yield "".join(turn.question)
            yield from ("".join(sentence.fragments) for sentence in turn.sentences)
            for call in turn.calls:
                yield from (call.call_json, call.result)


if __name__ == "__main__":
    build_tokenizer().save_pretrained(Path(sys.argv[1]))
