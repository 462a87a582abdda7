"""`keyword`: the text says itself that it turns to something else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from sfi_agent import Boundary, Settings, StepEvent, TokenEvent

__all__ = ["Keyword", "KeywordConfig"]


class KeywordConfig(Settings):
    """Options of `keyword`."""

    words: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("therefore", "however"),
        strict=False,
        min_length=1,
        description="Words that open a slow step, in any case of letters.",
        json_schema_extra={"unit": "text"},
    )


class Keyword:
    """Reports the token that ends one of the given words, that is, brings what follows the word.

    Looks at the running text, so a word may be spread over any number of tokens. Keeps no more
    text than the longest word needs.
    """

    needs: frozenset[str] = frozenset({"text"})

    def __init__(self, config: KeywordConfig, tokenizer: Any = None) -> None:
        words = "|".join(re.escape(word) for word in config.words)
        self._pattern = re.compile(rf"(?<!\w)({words})\W", re.IGNORECASE)
        # One character before the word decides whether it starts there.
        self._tail_characters = max(len(word) for word in config.words) + 1
        self._tail = ""

    def reset(self, prompt_ids: Sequence[int], prompt_text: str) -> None:
        """Forget the text; words of the prompt are no boundaries."""
        self._tail = prompt_text[-1:]

    def after_step(self, event: StepEvent) -> Boundary | None:
        """No boundary: words are seen in tokens."""
        return None

    def after_token(self, event: TokenEvent) -> Boundary | None:
        """A boundary when this token's text completes one of the words."""
        text = self._tail + event.text
        found = self._pattern.search(text)
        self._tail = text[-self._tail_characters :]
        if found is None:
            return None
        # The word is used up; the character behind it may stand in front of the next word.
        self._tail = text[found.end() - 1 :][-self._tail_characters :]
        return Boundary(f"keyword: {found[1].lower()}")

    def snapshot(self) -> str:
        """The end of the running text."""
        return self._tail

    def restore(self, state: str) -> None:
        """Set the end of the running text."""
        self._tail = state
