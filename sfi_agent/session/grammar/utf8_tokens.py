"""Which tokens keep the bytes of a text valid UTF-8; tokens may begin and end within characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Utf8Tokens"]

_DECODER = codecs.getincrementaldecoder("utf-8")


class Utf8Tokens:
    """See the module text; what it finds out is kept.

    Args:
        token_bytes: The bytes of every token.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        # Only these can go on within a character, and nothing else can.
        self._going_on = [i for i, text in enumerate(token_bytes) if text[:1] and text[0] >> 6 == 2]
        self._found: dict[bytes, Tensor] = {}

    def allowed_behind(self, open_bytes: bytes) -> Tensor:
        """The tokens that may come next, `[vocabulary]` bool.

        Args:
            open_bytes: The beginning of a character that the text ends with; usually empty.
        """
        if open_bytes not in self._found:
            found = torch.zeros(len(self._token_bytes), dtype=torch.bool)
            places = self._going_on if open_bytes else range(len(self._token_bytes))
            found[[i for i in places if self._is_valid(open_bytes + self._token_bytes[i])]] = True
            self._found[open_bytes] = found
        return self._found[open_bytes]

    @staticmethod
    def open_end(text: bytes) -> bytes:
        """The beginning of a character that valid text ends with."""
        decoder = _DECODER()
        decoder.decode(text)
        return decoder.getstate()[0]

    @staticmethod
    def _is_valid(text: bytes) -> bool:
        decoder = _DECODER()
        try:
            decoder.decode(text)
        except UnicodeDecodeError:
            return False
        # Of a surrogate, which is no character, Python waits for the third byte.
        rest = decoder.getstate()[0]
        return not (rest[:1] == b"\xed" and rest[1:] >= b"\xa0")
