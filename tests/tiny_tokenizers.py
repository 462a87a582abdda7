"""Tiny real tokenizers, built in process: fast tokenizers of transformers without any download.

`chatml_tokenizer` is a byte-level BPE with the control tokens of ChatML and Hermes tool calls,
`metaspace_tokenizer` is a Llama-2-like BPE with metaspace and byte fallback, `byte_tokenizer` has
one token per byte. Each call returns a new object that a test may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tests.chat_templates import CHATML

CORPUS = (
    "The report of Monday lists every name, room and date. What does it say about Ada?",
    "Find the failing test, read the file and fix it. 3.14 is a number; e.g. this one.",
    '{"name": "search", "arguments": {"query": "Ada", "limit": 3}} {"result": [1, 2, 3]}',
    "You are a careful assistant. user system assistant tool\n\nhello world, hello again!",
    "# Tools\nYou may call one or more functions to answer. role: content: name: parameters:",
)

CHATML_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

HERMES_RESPONSE_TEMPLATE: dict[str, Any] = {
    "version": 1,
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


@lru_cache
def _byte_level_json(vocabulary_size: int, added: tuple[tuple[str, bool], ...]) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    for content, special in added:
        token = AddedToken(content, special=special, normalized=False)
        backend.add_special_tokens([token]) if special else backend.add_tokens([token])
    return str(backend.to_str())


def _wrap(backend_json: str, **options: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend_json), **options)


def chatml_tokenizer(
    chat_template: str | None = CHATML,
    *,
    response_template: dict[str, Any] | None = None,
    special_tokens: Sequence[str] = (),
    markup_tokens: Sequence[str] = (),
    eos_token: str = "<|im_end|>",
    bos_token: str | None = None,
    vocabulary_size: int = 400,
) -> Any:
    """A byte-level BPE with ChatML control tokens.

    Args:
        chat_template: Jinja source; None leaves the tokenizer without a template.
        response_template: How transformers should parse outputs; None leaves it out.
        special_tokens: Further special tokens (`special=True`), such as "<|eot_id|>".
        markup_tokens: Further added tokens that are not special, such as "[TOOL_CALLS]".
        eos_token: One of the special tokens.
        bos_token: One of the special tokens, or None.
        vocabulary_size: Tokens of the BPE before the added ones, at least 256.
    """
    added = [(token, True) for token in (*CHATML_SPECIAL_TOKENS, *special_tokens)]
    added += [(token, False) for token in (*CHATML_MARKUP_TOKENS, *markup_tokens)]
    tokenizer = _wrap(
        _byte_level_json(vocabulary_size, tuple(added)),
        eos_token=eos_token,
        pad_token="<|endoftext|>",
        bos_token=bos_token,
    )
    tokenizer.chat_template = chat_template
    if response_template is not None:
        tokenizer.response_template = response_template
    return tokenizer


def byte_tokenizer(chat_template: str | None = None) -> Any:
    """One token per byte (ids below 256) and the three special tokens of ChatML."""
    added = tuple((token, True) for token in CHATML_SPECIAL_TOKENS)
    tokenizer = _wrap(
        _byte_level_json(256, added), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@lru_cache
def _metaspace_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(set("".join(CORPUS).replace(" ", "▁").replace("\n", "")))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, limit_alphabet=len(alphabet)
    )
    trained.train_from_iterator([text.replace("\n", " ") for text in CORPUS] * 4, trainer)
    learned = trained.get_vocab()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(learned, key=lambda name: learned[name])
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [(left, right) for left, right in _merges_of(trained)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(name, special=True, normalized=False) for name in names[:3]]
    backend.add_special_tokens([*special, AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return str(backend.to_str())


def _merges_of(backend: Any) -> list[list[str]]:
    import json

    merges = json.loads(backend.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def metaspace_tokenizer(chat_template: str | None = None) -> Any:
    """A BPE in the manner of Llama 2: metaspace, byte fallback, a leading space stripped."""
    tokenizer = _wrap(_metaspace_json(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer
