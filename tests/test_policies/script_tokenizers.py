"""Tokenizers of every granularity over many scripts, and how their tokens divide a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from sfi_agent import Boundary, BoundaryDetector, TokenEvent
from sfi_agent.session.output.text_stream import TextStream
from tests.tiny_tokenizers import byte_tokenizer, chatml_tokenizer, metaspace_tokenizer

CORPUS = (
    "The rain stopped.\n\nThe sun came out. A man said: “Let us go.” Then he left. It was late.",
    "He paid 3.14 euros, e.g. for tea. She asked. Why? No one knew! Then it began. (See it.) Now",
    "他来了。我们走吧！今天很好。「好。」他说。你是谁？我不知道。天气很好。他走了。",
    "नमस्ते। आप कैसे हैं? मैं ठीक हूँ। धन्यवाद॥ هل أنت هنا؟ نعم. أنا هنا. سنذهب الآن؟ لا",
    "Он пришёл. Она ушла! Почему? Не знаю. Այո։ Ոչ։ አዎ። አይ። ဟုတ်ကဲ့။ မဟုတ်ဘူး။ បាទ។ ទេ។ ཡིན།",
)


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _trained(backend: Any, size: int, alphabet: list[str]) -> Any:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def _byte_level(*, by_word: bool) -> Any:
    """A byte-level BPE: merges within words, or across spaces, marks and line ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_word)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _wrapped(_trained(backend, 900 if by_word else 1400, alphabet))


def _unigram() -> Any:
    """A unigram vocabulary with metaspace and byte fallback, as SentencePiece makes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = sorted({word for text in CORPUS for word in text.split()})
    letters = sorted({letter for text in CORPUS for letter in text if not letter.isspace()})
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    names += [f"▁{word}" for word in words] + [word for word in words if len(word) > 1]
    scores = {name: -12.0 for name in names} | {f"▁{word}": -8.0 for word in words}
    vocabulary = [(name, scores[name]) for name in dict.fromkeys(names)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    chain = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    backend.decoder = decoders.Sequence(chain)
    return _wrapped(backend)


_MAKERS: dict[str, Callable[[], Any]] = {
    "one byte per token": byte_tokenizer,
    "byte-level, English words": chatml_tokenizer,
    "byte-level, many scripts": lambda: _byte_level(by_word=True),
    "byte-level, across sentences": lambda: _byte_level(by_word=False),
    "metaspace and byte fallback": metaspace_tokenizer,
    "unigram and byte fallback": _unigram,
}
TOKENIZER_NAMES = tuple(_MAKERS)


@lru_cache
def tokenizer_named(name: str) -> Any:
    """One of the tokenizers, made once."""
    return _MAKERS[name]()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, which must round-trip, or the test would test another text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    return ids


def completed_characters(tokenizer: Any, ids: list[int]) -> Iterator[int]:
    """For every token, how many characters of the text are complete behind it: the slow way."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        yield len(text.rstrip("\ufffd"))


def tokens_that_complete(tokenizer: Any, ids: list[int], offsets: set[int]) -> list[int]:
    """Indices of the tokens that complete the characters at these offsets."""
    found, before = [], 0
    for index, complete in enumerate(completed_characters(tokenizer, ids)):
        if any(before <= offset < complete for offset in offsets):
            found.append(index)
        before = max(before, complete)
    return found


def decode_with(
    detector: BoundaryDetector, tokenizer: Any, ids: list[int], prompt_ids: tuple[int, ...] = ()
) -> list[Boundary | None]:
    """Show a decoding to a detector; what it reports for every token."""
    stream = TextStream(tokenizer)
    detector.reset(prompt_ids, stream.push_all(prompt_ids))
    return [
        detector.after_token(TokenEvent(token_id, len(prompt_ids) + index, stream.push(token_id)))
        for index, token_id in enumerate(ids)
    ]


def boundary_tokens(
    detector: BoundaryDetector, tokenizer: Any, ids: list[int], prompt_ids: tuple[int, ...] = ()
) -> list[int]:
    """Indices of the tokens that a detector reports."""
    answers = decode_with(detector, tokenizer, ids, prompt_ids)
    return [index for index, answer in enumerate(answers) if answer is not None]


def unmark(marked: str, mark: str = "|") -> tuple[str, set[int]]:
    """Split a text in which a mark stands before every expected start into text and offsets."""
    parts = marked.split(mark)
    offsets, length = set(), 0
    for part in parts[:-1]:
        length += len(part)
        offsets.add(length)
    return "".join(parts), offsets
