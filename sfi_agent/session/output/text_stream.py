"""Text from token ids, piece by piece, at constant cost per token.

A short window of ids is decoded again with every token: the ids of the last piece, which tell a
decoder that it is not at the start of the text (where metaspace decoders drop a space), and the
ids whose text is not given out yet. The whole state is a few small tuples, so that it can be
taken and put back whenever a sequence is rewound. `tokenizers.decoders.DecodeStream` was tried
instead: it cannot be rewound and raises on ids that are no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "TextStreamState"]

_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 24
_KEPT_TOKENS = 8
_LONG_PROMPT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class TextStreamState:
    """Where a stream stands. Immutable: the same state may be restored many times.

    Attributes:
        window: Ids that are decoded again with the next token.
        given: Characters of the window's text that were given out already.
        run: Ids of the byte tokens of the character being put together.
    """

    window: tuple[int, ...] = ()
    given: int = 0
    run: tuple[int, ...] = ()


class TextStream:
    """Turns the tokens of one sequence into text as they come.

    The pieces joined, with `finish()` at the end, equal `tokenizer.decode(ids)` (without clean-up
    of spaces). One exception: where byte-fallback tokens (`<0x..>`) form no valid UTF-8, `decode`
    makes a replacement character of every byte of the run, good characters included; the stream
    gave those out when they were complete and keeps them.

    Args:
        tokenizer: Any fast tokenizer; a slow one works as far as its `decode` is local.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder if skip_special_tokens else {}
        self._skipped_ids = frozenset(index for index, token in added.items() if token.special)
        self._byte_values = _byte_fallback_values(tokenizer)
        self._state = TextStreamState()

    def push(self, token_id: int) -> str:
        """The text this token adds; "" while a character is incomplete."""
        if token_id in self._skipped_ids:
            return ""
        if token_id in self._byte_values:
            return self._push_byte(token_id)
        head = self._end_run()
        return head + self._push_text(token_id)

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The text these tokens add; a long prompt at the start is decoded in one go."""
        if self._state == TextStreamState() and len(token_ids) > _LONG_PROMPT_TOKENS:
            return self._start_with(token_ids)
        return "".join(self.push(token_id) for token_id in token_ids)

    def _start_with(self, token_ids: Sequence[int]) -> str:
        visible = [index for index in token_ids if index not in self._skipped_ids]
        text = self._decode(visible)
        # Where the stream stands depends on the last few ids only.
        for token_id in visible[-_LONG_PROMPT_TOKENS:]:
            self.push(token_id)
        state = self._state
        held_back = len(state.run) + len(self._decode(state.window)) - state.given
        return text[: len(text) - held_back]

    def finish(self) -> str:
        """What is still held back, as replacement characters. The stream may go on afterwards,
        as if this text had been given out by the last token."""
        piece = self._end_run()
        text = self._decode(self._state.window)
        piece += text[self._state.given :]
        self._state = replace(self._state, given=len(text))
        return piece

    def snapshot(self) -> TextStreamState:
        """The whole state, as a value that later tokens do not change."""
        return self._state

    def restore(self, state: TextStreamState) -> None:
        """Go back to where `snapshot` was taken."""
        self._state = state

    def _push_text(self, token_id: int) -> str:
        window, given = (*self._state.window, token_id), self._state.given
        text = self._decode(window)
        # Only the last character can still change: an incomplete one is a single replacement
        # character there. Fewer characters than before means a decoder that looks back; wait.
        complete = len(text) - text.endswith(_REPLACEMENT)
        piece = text[given:complete]
        if complete == len(text) and len(text) > given:
            # Everything is given out: this token alone is context enough for the next one.
            self._state = TextStreamState((token_id,), len(self._decode((token_id,))))
            return piece
        given = max(given, complete)
        if len(window) > _WINDOW_TOKENS:
            window, given = self._trim(window, len(text) - given)
        self._state = TextStreamState(window, given)
        return piece

    def _trim(self, window: tuple[int, ...], held_back: int) -> tuple[tuple[int, ...], int]:
        # UTF-8 finds its own start again, and an incomplete character spans at most three tokens.
        kept = window[-_KEPT_TOKENS:]
        return kept, len(self._decode(kept)) - held_back

    def _push_byte(self, token_id: int) -> str:
        run = (*self._state.run, token_id)
        data = bytes(self._byte_values[index] for index in run)
        try:
            piece = data.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                self._state = replace(self._state, run=run)
                return ""
            return self._give_up_on(run)
        self._state = replace(self._state, run=())
        return self._after_run(run, piece)

    def _give_up_on(self, run: tuple[int, ...]) -> str:
        # The last byte does not continue the character: what is before it is broken, and the
        # last byte may begin a new one.
        broken = run[:-1] or run
        self._state = replace(self._state, run=())
        piece = self._after_run(broken, _REPLACEMENT * len(broken))
        return piece + (self._push_byte(run[-1]) if len(run) > 1 else "")

    def _end_run(self) -> str:
        run = self._state.run
        if not run:
            return ""
        self._state = replace(self._state, run=())
        return self._after_run(run, _REPLACEMENT * len(run))

    def _after_run(self, run: tuple[int, ...], piece: str) -> str:
        if self._state.window:
            return piece
        # The text begins with bytes: they are the context, and a leading space may be dropped.
        text = self._decode(run)
        self._state = TextStreamState(run, len(text))
        return text if len(text) < len(piece) else piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _byte_fallback_values(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Byte value of every byte-fallback token, empty where the decoder knows none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteFallback" not in repr(backend.decoder):
        return {}
    values = {}
    for byte in range(256):
        for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>"):
            index = backend.token_to_id(name)
            if index is not None:
                values[index] = byte
    return values
