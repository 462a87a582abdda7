"""Grammars over a vocabulary of single bytes: what they allow is known letter by letter."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import torch
import xgrammar

__all__ = ["allows", "matcher_of", "walked"]

END = 256


@lru_cache
def compiler() -> Any:
    letters = [bytes([value]) for value in range(256)] + [b"<end>"]
    info = xgrammar.TokenizerInfo(
        letters, xgrammar.VocabType.RAW, vocab_size=END + 1, stop_token_ids=[END]
    )
    return xgrammar.GrammarCompiler(info)


def matcher_of(form: dict[str, Any]) -> Any:
    """Of one of xgrammar's formats."""
    tag = {"type": "structural_tag", "format": form}
    return xgrammar.GrammarMatcher(compiler().compile_structural_tag(json.dumps(tag)))


def allows(found: Any, text: str) -> bool:
    """Whether a text is whole to a fresh matcher."""
    return bool(found.accept_string(text)) and bool(found.accept_token(END))


def walked(found: Any, lots: random.Random, longest: int) -> str | None:
    """Letters chosen at random among those that are allowed; None where there is no end."""
    text = bytearray()
    words = xgrammar.allocate_token_bitmask(1, END + 1)
    while len(text) < longest:
        found.fill_next_token_bitmask(words)
        bits = (words[0][:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        allowed = bits.flatten()[: END + 1].nonzero().flatten().tolist()
        ends = [letter for letter in allowed if letter == END or chr(letter) in "\"'}])<|>0"]
        usual = [letter for letter in allowed if 32 <= letter < 127]
        letter = lots.choice(lots.choice([ends or allowed, usual or allowed, allowed]))
        assert found.accept_token(letter)
        if letter == END:
            try:
                return text.decode()
            except UnicodeDecodeError:
                return None  # A session bars bytes that are no characters.
        text.append(letter)
    return None
