"""What every token of a vocabulary adds to the text, in bytes, for any fast tokenizer."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from sfi_agent import ConfigError

__all__ = [
    "VocabularyPieces",
    "require_fast_tokenizer",
    "require_tokenizer",
    "vocabulary_pieces",
]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR_TEXTS = ("a", "A", "1", "\u2581a", "\u0120a", "x", "0")


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """The byte that each symbol of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes, in ascending order, for
    the code points from 256 on (the alphabet of GPT-2's tokenizer).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {chr(byte): byte for byte in printable}
    symbols.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return symbols


def require_tokenizer(detector: str, tokenizer: Any, reason: str) -> None:
    """Refuse to build a detector without a tokenizer.

    Args:
        detector: Name of the detector that asks.
        tokenizer: What the factory was given.
        reason: What the detector needs it for.

    Raises:
        ConfigError: `tokenizer` is None.
    """
    if tokenizer is None:
        raise _refused(detector, "no tokenizer", reason)


def require_fast_tokenizer(detector: str, tokenizer: Any, reason: str) -> None:
    """Refuse to build a detector without a tokenizer whose vocabulary can be read.

    Raises:
        ConfigError: `tokenizer` is None or has no `backend_tokenizer`.
    """
    require_tokenizer(detector, tokenizer, reason)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        got = f"a {type(tokenizer).__name__}, which has no backend_tokenizer"
        raise _refused(detector, got, reason)


def _refused(detector: str, got: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the detector {detector!r} was built; got {got}; allowed: a Hugging Face fast tokenizer, "
        f"for {reason}. Pass the checkpoint's tokenizer, or choose a detector that needs none, "
        "such as interval."
    )


class VocabularyPieces:
    """The table of a vocabulary: per id the bytes it adds to a running text.

    An entry is made when its id is first met and then kept, so that nothing is paid for the
    hundred thousand tokens that a session never sees. Three kinds of entries exist: byte-level
    tokens are mapped symbol by symbol, byte tokens ("<0xE3>") by their number, and every other
    token by decoding it behind an anchor token, which is right for any decoder that works token
    by token (metaspace, WordPiece, suffixes) because it *is* that decoder.
    """

    def __init__(self, tokenizer: Any) -> None:
        # Holds the Rust object and not the tokenizer, which is the weak key of the cache.
        self._backend = tokenizer.backend_tokenizer
        self._control_ids = frozenset(tokenizer.all_special_ids)
        self._decoder_kinds = _decoder_kinds(self._backend)
        self._anchor_id, self._anchor_text = _find_anchor(self._backend)
        self._pieces: dict[int, bytes | None] = {}

    def piece(self, token_id: int) -> bytes | None:
        """The bytes of a token; None for special tokens and for ids without a token."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._make_piece(token_id)
            return piece

    def _make_piece(self, token_id: int) -> bytes | None:
        if token_id in self._control_ids:
            return None
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if "ByteLevel" in self._decoder_kinds:
            symbols = _byte_of_symbol()
            if all(symbol in symbols for symbol in token):
                return bytes(symbols[symbol] for symbol in token)
            return str(token).encode("utf-8")  # An added token with characters outside the map.
        match = _BYTE_TOKEN.fullmatch(token)
        if match and "ByteFallback" in self._decoder_kinds:
            return bytes([int(match[1], 16)])
        return self._decode_behind_anchor(token_id).encode("utf-8", "surrogatepass")

    def _decode_behind_anchor(self, token_id: int) -> str:
        ids = [token_id] if self._anchor_id is None else [self._anchor_id, token_id]
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text[len(self._anchor_text) :]


def _decoder_kinds(backend: Any) -> frozenset[str]:
    """The names of the decoders a tokenizer chains."""
    if backend.decoder is None:
        return frozenset()
    described = json.loads(backend.decoder.__getstate__())
    chain = described["decoders"] if described["type"] == "Sequence" else [described]
    return frozenset(decoder["type"] for decoder in chain)


def _find_anchor(backend: Any) -> tuple[int | None, str]:
    """A token whose text does not change when another one follows, and that text."""
    for candidate in _ANCHOR_TEXTS:
        token_id = backend.token_to_id(candidate)
        if token_id is None:
            continue
        alone: str = backend.decode([token_id], skip_special_tokens=False)
        if backend.decode([token_id, token_id], skip_special_tokens=False).startswith(alone):
            return token_id, alone
    return None, ""


_CACHE: WeakKeyDictionary[Any, tuple[tuple[int, int], VocabularyPieces]] = WeakKeyDictionary()


def vocabulary_pieces(tokenizer: Any) -> VocabularyPieces:
    """The table of a tokenizer; shared by all detectors as long as the tokenizer lives.

    Tokens that are added to the tokenizer later give a new table.
    """
    size = (len(tokenizer), len(tokenizer.all_special_ids))
    cached = _CACHE.get(tokenizer)
    if cached is None or cached[0] != size:
        cached = _CACHE[tokenizer] = (size, VocabularyPieces(tokenizer))
    return cached[1]
