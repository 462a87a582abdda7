"""Token windows: a history to prefill and the text that follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sfi_agent.session.engine import Engine

__all__ = ["Window", "WindowReader", "WindowSizes", "tokenizer_of"]

_CHARACTERS_PER_TOKEN = 4
_SPARE_TOKENS = 16
"""A cut in the middle of a word changes the ids before the cut, hardly ever more than this many."""


@dataclass(frozen=True, slots=True)
class Window:
    """One sample: what is prefilled, and the text that follows it.

    Attributes:
        prompt_ids: The history, at least 2 ids.
        text_ids: The ids of the text behind it, at least 1.
        origin: Where it comes from, such as a file and a place in it.
    """

    prompt_ids: tuple[int, ...]
    text_ids: tuple[int, ...]
    origin: str


@dataclass(frozen=True, slots=True)
class WindowSizes:
    """How many windows of what size.

    Attributes:
        prompt_tokens: Tokens of history, at least 2.
        continuation_tokens: Tokens behind it, at least 1.
        samples: Windows, at least 1.

    Raises:
        InputError: A number is not an integer or too small.
    """

    prompt_tokens: int
    continuation_tokens: int
    samples: int

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 2), ("continuation_tokens", 1), ("samples", 1)):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < least:
                raise InputError(
                    explain(
                        "cut text into windows",
                        got=f"{name}={given!r}",
                        allowed=f"an integer of at least {least}",
                    )
                )

    @property
    def tokens(self) -> int:
        """Tokens of one window."""
        return self.prompt_tokens + self.continuation_tokens


def tokenizer_of(engine: Engine) -> PreTrainedTokenizerBase:
    """The engine's tokenizer.

    Raises:
        InputError: It has none.
    """
    if engine.tokenizer is None:
        raise InputError(
            explain(
                "measured fidelity on text",
                got=f"{type(engine.model).__name__} without a tokenizer",
                allowed="a checkpoint with its tokenizer files",
                remedy="copy the tokenizer files beside the weights, or call measure_fidelity "
                "with windows of token ids",
            )
        )
    return engine.tokenizer


class WindowReader:
    """Turns places of a text into windows, without tokenizing what no window needs.

    Args:
        tokenizer: Any; what it puts in front of a text by itself (such as a BOS token) is put in
            front of every window, since models can need it to work at all.
        sizes: Of the windows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sizes: WindowSizes) -> None:
        self._tokenizer: Any = tokenizer
        self.sizes = sizes
        self._prefix = tuple(_prefix_ids(self._tokenizer))

    @property
    def needed_tokens(self) -> int:
        """Tokens of text that a window takes, without what is put in front of it."""
        return max(2, self.sizes.tokens - len(self._prefix))

    def count(self, text: str) -> int:
        """Tokens of a text, without special ones in front and behind."""
        return len(self._encode(text))

    def window(self, text: str, start: int, origin: str) -> Window | None:
        """The window that begins at a character of the text; None if too little follows."""
        ids = self._leading_ids(text, start)
        if len(ids) < self.needed_tokens:
            return None
        ids = [*self._prefix, *ids[: self.needed_tokens]]
        cut = self.sizes.prompt_tokens
        return Window(tuple(ids[:cut]), tuple(ids[cut:]), origin)

    def last_start(self, text: str) -> int | None:
        """A late character from which a whole window follows; None if the text is too short."""
        characters = self.needed_tokens * _CHARACTERS_PER_TOKEN
        while True:
            start = max(0, len(text) - characters)
            if self.count(text[start:]) >= self.needed_tokens + (_SPARE_TOKENS if start else 0):
                return start
            if start == 0:
                return None
            characters *= 2

    def _leading_ids(self, text: str, start: int) -> list[int]:
        characters = self.needed_tokens * _CHARACTERS_PER_TOKEN
        while True:
            end = min(len(text), start + characters)
            ids = self._encode(text[start:end])
            if end == len(text) or len(ids) >= self.needed_tokens + _SPARE_TOKENS:
                return ids
            characters *= 2

    def _encode(self, text: str) -> list[int]:
        # `verbose=False`: a text longer than the model's context is fine here.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids


def _prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []
