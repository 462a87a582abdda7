"""The text of an answer, put together from the parts between its markup."""

from __future__ import annotations

__all__ = ["JoinedText"]


class JoinedText:
    """Text with white space beside markup left out; parts around markup get lines of their own."""

    def __init__(self, *, after_markup: bool = False) -> None:
        self._parts: list[str] = []
        self._space = ""
        self._after_markup = after_markup

    @property
    def value(self) -> str:
        """The text so far."""
        return "".join(self._parts)

    def add(self, text: str) -> str:
        """Take text; returns what is certain to stay."""
        if self._after_markup:
            text = text.lstrip()
            if not text:
                return ""
            self._space = "\n" if self._parts else ""
            self._after_markup = False
        whole = self._space + text
        kept = whole.rstrip()
        self._space = whole[len(kept) :]
        if kept:
            self._parts.append(kept)
        return kept

    def interrupt(self) -> None:
        """Markup begins here."""
        self._space = ""
        self._after_markup = True

    def end(self) -> str:
        """The turn is over: white space at the end of the text stays."""
        rest, self._space = self._space, ""
        if rest:
            self._parts.append(rest)
        return rest
