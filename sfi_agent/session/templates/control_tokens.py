"""Control tokens in text that did not come from the template or the model: kept as plain text.

A tool result or a user message may contain `<|im_end|>`; encoded as it stands, it would end the
turn and whatever follows would speak with another role. Before a chat is rendered, every control
token inside such text is broken by a random separator after its first character; after rendering,
the text is cut at the separators and the pieces are encoded one by one. No piece holds a whole
control token, the separators leave no trace, and the template's own control tokens are untouched.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from sfi_agent.errors import InputError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ControlTokens"]


class ControlTokens:
    """The control tokens of one tokenizer and template.

    These are all special tokens, and the other added tokens that stand in the template's source
    (such as `<tool_call>`), except pure white space.

    Args:
        tokenizer: Its added tokens are read once.
        template: Source of the chat template.

    Attributes:
        ids: Id of each control token, by its text.
        special_texts: The special ones among them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        tokens = tokenizer.added_tokens_decoder
        self.ids: dict[str, int] = {
            token.content: index
            for index, token in tokens.items()
            if not token.content.isspace() and (token.special or token.content in template)
        }
        self._texts = {index: text for text, index in self.ids.items()}
        self.special_texts = frozenset(text for text in self.ids if tokens[self.ids[text]].special)
        longest_first = sorted(self.ids, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._separator = _separator(random_bytes=16)

    def with_other_separator(self) -> ControlTokens:
        """The same tokens, broken by a separator of other characters and another length."""
        other = copy(self)
        other._separator = _separator(random_bytes=len(self._separator))
        return other

    def protect(self, value: Any) -> Any:
        """A copy of messages, tools or a string in which no control token is whole.

        Strings are treated wherever they stand in lists and mappings, keys included.

        Raises:
            InputError: A control token of a single character, which cannot be broken.
        """
        if isinstance(value, str):
            return self._break(value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.protect(item) for item in value]
        return value

    def plain(self, rendered: str) -> str:
        """Rendered text without separators."""
        return rendered.replace(self._separator, "")

    def first(self, rendered: str) -> str | None:
        """The control token that the text begins with, or None."""
        match = self._pattern.match(rendered)
        return match.group() if match else None

    def spans(self, rendered: str) -> Iterator[tuple[int, str]]:
        """Start and text of all control tokens of a rendered text, in order."""
        for match in self._pattern.finditer(rendered):
            yield match.start(), match.group()

    def shared(self, left: str, right: str) -> int:
        """Length of the beginning that two rendered texts share, in whole control tokens."""
        length = len(commonprefix([left, right]))
        for text in (left, right):
            inside = (start for start, token in self.spans(text) if start + len(token) > length)
            length = min(length, next(inside, length))
        return length

    def encode(self, rendered: str) -> list[int]:
        """Ids of a text that was rendered from protected input. No special token is added.

        Raises:
            InputError: The tokenizer makes a control token of other characters, such as full-width
                ones.
        """
        pieces = rendered.split(self._separator)
        ids = self._ids(pieces[0])
        for piece in pieces[1:]:
            ids += self.encode_inside(piece)
        self._refuse_others(pieces, ids)
        return ids

    def encode_inside(self, piece: str) -> list[int]:
        """Ids of a piece of text that does not stand at the beginning."""
        # Tokenizers with metaspace put a space before what they take for the start of a text.
        # Behind a line break they do not; its ids are removed again.
        if not piece:
            return []
        lead = self._ids("\n")
        ids = self._ids("\n" + piece)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._ids(piece)

    def _break(self, text: str) -> str:
        parts, start, search_from = [], 0, 0
        while match := self._pattern.search(text, search_from):
            if match.end() - match.start() < 2:
                raise InputError(
                    explain(
                        "Keep control tokens of a message as plain text",
                        got=f"the single-character control token {match.group()!r}",
                        remedy="Remove it from the text",
                    )
                )
            # Going on one character later also breaks tokens that overlap this one.
            search_from = match.start() + 1
            parts.append(text[start:search_from])
            start = search_from
        return self._separator.join([*parts, text[start:]])

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return list(ids)

    def _refuse_others(self, pieces: Sequence[str], ids: Sequence[int]) -> None:
        found = Counter(index for index in ids if index in self._texts)
        found.subtract(self.ids[text] for piece in pieces for _, text in self.spans(piece))
        for index, count in found.items():
            if count > 0 and index != self._tokenizer.unk_token_id:
                raise InputError(
                    explain(
                        "Keep control tokens of a message as plain text",
                        got=f"other characters that the tokenizer reads as {self._texts[index]!r}",
                        remedy="Remove them from the text",
                    )
                )


def _separator(random_bytes: int) -> str:
    # Letters and digits only: a template may strip, escape or JSON-encode what it is given.
    return f"sfi{secrets.token_hex(random_bytes)}sfi"
