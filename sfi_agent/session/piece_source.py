"""The running text that boundary detectors see, from the session's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sfi_agent.session.output.text_stream import TextStream, TextStreamState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenizerPieces"]


class TokenizerPieces:
    """Feeds ids to a text stream; control tokens are part of the text (see `PieceSource`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer)

    def start(self, prompt_ids: Sequence[int]) -> str:
        self._stream = TextStream(self._tokenizer)
        return self._stream.push_all(prompt_ids)

    def feed(self, token_id: int) -> str:
        return self._stream.push(token_id)

    def snapshot(self) -> TextStreamState:
        return self._stream.snapshot()

    def restore(self, state: TextStreamState) -> None:
        self._stream.restore(state)
