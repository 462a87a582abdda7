"""`punctuation`: a sentence starts. For any tokenizer and any script that marks sentence ends."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent
from sfi_policies._pieces import require_fast_tokenizer, vocabulary_pieces
from sfi_policies._sentences import ScannerState, SentenceScanner

__all__ = ["Punctuation", "PunctuationConfig"]

_CONTEXT_TOKENS = 64  # Enough for the word before the first chosen token, even byte by byte.
_BOUNDARY = Boundary("punctuation: sentence start")


class PunctuationConfig(Settings):
    """Options of `punctuation`: none."""


@dataclass(frozen=True, slots=True)
class _State:
    """Bytes of an incomplete character, and what the scanner remembers."""

    incomplete: bytes
    scanner: ScannerState


class Punctuation:
    """Reports the token that starts a sentence, not the mark that ended the one before.

    Works on ids alone: what a token adds comes from a table of the tokenizer's vocabulary, in
    bytes, so a character that is spread over several tokens is put together here and counts when
    its last byte arrives. The session need not decode text for it. Which characters start a
    sentence is decided by rules that look at the character before and the character itself
    (Unicode Standard Annex #29 and a short list of abbreviations): decimals, versions, links,
    abbreviations, initials, list numbers and an ellipsis before a lower-case word are not ends;
    closing quotes, brackets, citations and tags belong to the sentence before. The marks of all
    scripts are those of Unicode's Sentence_Terminal and a few more. A token that holds the end of
    one sentence and the start of the next (".\\n\\nThe") is itself reported.

    The prompt gives context ("3" before a chosen ".14") and no boundary: the first token of a
    decoding comes from a dense step anyway. Special tokens add no text and end a line.

    The rule that the next sentence's first token opens the slow step is that of Slow-Fast
    Inference (arXiv 2603.12038); its fixed tables of token ids are replaced.

    Args:
        config: No options.
        tokenizer: A Hugging Face fast tokenizer.

    Raises:
        ConfigError: There is no fast tokenizer.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: PunctuationConfig, tokenizer: Any) -> None:
        require_fast_tokenizer("punctuation", tokenizer, "the text of every token it may meet")
        self._vocabulary = vocabulary_pieces(tokenizer)
        self._scanner = SentenceScanner()
        self._incomplete = b""

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Start behind the prompt, of which the last word is remembered."""
        self._scanner = SentenceScanner()
        self._incomplete = b""
        for token_id in prompt_ids[-_CONTEXT_TOKENS:]:
            self._read(token_id)
        self._scanner.drop_ending()

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary: sentences are seen in tokens."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """A boundary when this token completes the first character of a sentence."""
        return _BOUNDARY if self._read(event.token_id) else None

    def snapshot(self) -> _State:
        """Incomplete bytes and the state of the scanner; does not grow with the text."""
        return _State(self._incomplete, self._scanner.state)

    def restore(self, state: _State) -> None:
        """Return to such a state."""
        self._incomplete = state.incomplete
        self._scanner.state = state.scanner

    def _read(self, token_id: int) -> bool:
        piece = self._vocabulary.piece(token_id)
        if piece is None:
            self._incomplete = b""
            self._scanner.interrupt()
            return False
        held = self._incomplete + piece
        # Bytes that can never become a character turn into U+FFFD, as in every decoder.
        text, used = codecs.utf_8_decode(held, "replace", False)
        self._incomplete = held[used:]
        return self._scanner.feed(text)
