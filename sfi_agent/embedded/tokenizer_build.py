"""Builds the embedded tokenizer: byte-level BPE, 2,048 tokens, from the world's own text.

Pre-tokens are a word with the space before it, one digit, a run of punctuation marks with the
space before it, or one white-space character. Bytes are the base alphabet, so any text can be
encoded and decoding gives it back. The training text weighs words of the lexicon high enough to
make each a single token; the build fails when one is not.

Run: python -m sfi_agent.embedded.tokenizer_build DIR
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.embedded import chat_format, lexicon
from sfi_agent.embedded.documents import SYSTEM_SENTENCES, tool_schemas
from sfi_agent.embedded.questions import KINDS, make_turn
from sfi_agent.embedded.world import make_office

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY_SIZE", "build_tokenizer"]

VOCABULARY_SIZE = 2048
_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_CONTROL = (chat_format.END_OF_TEXT, chat_format.MESSAGE_OPEN, chat_format.MESSAGE_CLOSE)
_WORD_REPEATS = 400


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer and wrap it with its chat and response templates.

    Deterministic: the same code gives the same vocabulary and merges.

    Raises:
        RuntimeError: A name or value of the lexicon did not become a single token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(chat_format.KEPT_TOKENS),
        special_tokens=list(_CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    # Added after the training, because the trainer makes every token it is given a special one.
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
    _check(tokenizer)
    return tokenizer


def _lexicon_words() -> list[str]:
    fields = (*lexicon.PERSON_FIELDS, *lexicon.PROJECT_FIELDS)
    words = {
        word
        for group in (
            lexicon.EASY_PERSON_NAMES,
            lexicon.EASY_PROJECT_NAMES,
            *(field.values for field in fields),
        )
        for word in group
    }
    return sorted(words)


def _corpus() -> Iterator[str]:
    """Lexicon words, made-up logs with questions, system texts and tool schemas."""
    for word in _lexicon_words():
        for _ in range(_WORD_REPEATS):
            yield " " + word
    rng = random.Random("tokenizer")
    for index in range(160):
        office = make_office(
            rng, "hard" if index % 2 else "easy", 700, required=frozenset({"badge", "room"})
        )
        yield office.log
        for kind in KINDS:
            turn = make_turn(rng, office, kind)
            yield "".join(turn.question)
            for call in turn.calls:
                yield call.call_json
                yield call.result
            yield from ("".join(sentence) for sentence in turn.sentences)
    for text in (*SYSTEM_SENTENCES, *tool_schemas().values()):
        for _ in range(60):
            yield text
    for text in (chat_format.TOOLS_BEFORE, chat_format.TOOLS_AFTER, "system\nuser\nassistant\n"):
        for _ in range(200):
            yield text


def _check(tokenizer: PreTrainedTokenizerFast) -> None:
    split = [
        word
        for word in _lexicon_words()
        if len(tokenizer.encode(" " + word, add_special_tokens=False)) != 1
    ]
    if split or len(tokenizer) != VOCABULARY_SIZE:
        raise RuntimeError(
            f"tokenizer of {len(tokenizer)} tokens splits {len(split)} words: {split[:20]}"
        )


if __name__ == "__main__":
    build_tokenizer().save_pretrained(Path(sys.argv[1]))
