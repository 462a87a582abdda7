"""Shows how each token came to be: text with a row of marks under it, readable without colour.

A token of a fast step has no mark. A token of a slow step has the capital letter of the reason
under its first character, a retried one the small letter, and both have a colour. A newline is
shown as an arrow and a control token as a square, so that their marks have a place too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from sfi_agent.observe.trace import StepKind, StepRecord

__all__ = ["STYLES", "Glyphs", "ReasonMarks", "ShownToken", "marked_lines"]

STYLES: dict[StepKind, str] = {"fast": "", "slow": "bold cyan", "retry": "bold yellow"}
_LETTERS = {
    "prefill": "P",
    "max_segment": "M",
    "punctuation": "S",
    "spacy": "S",
    "structure": "T",
    "entropy": "E",
    "answer_start": "A",
    "drift": "D",
    "interval": "I",
    "random": "R",
}
_OTHER_LETTERS = "BCFGHJKLNOQUVWXYZ"


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters beyond ASCII, with stand-ins for terminals that cannot show them."""

    newline: str = "↵"
    control: str = "■"
    filled: str = "█"
    empty: str = "░"
    arrow: str = "→"

    @classmethod
    def for_encoding(cls, encoding: str) -> Glyphs:
        """The characters that an encoding can carry."""
        glyphs = cls()
        try:
            "".join((glyphs.newline, glyphs.control, glyphs.filled, glyphs.empty)).encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return cls(newline="|", control="#", filled="#", empty=".", arrow="->")
        return glyphs


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One generated token.

    Attributes:
        record: How it was decoded.
        text: The text it adds, "" while a character is incomplete.
        is_control: It is a control token, such as the one that ends a turn.
    """

    record: StepRecord
    text: str
    is_control: bool = False


@dataclass(slots=True)
class ReasonMarks:
    """Gives every reason its letter, and counts what was marked.

    Detectors that are not built in get a letter in the order in which they are met.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _letters: dict[str, str] = field(default_factory=lambda: dict(_LETTERS))

    def mark(self, record: StepRecord) -> str:
        """The mark of a step: "" for a fast one. Counts it."""
        if record.kind == "fast":
            return ""
        letter = self.letter(record.reason.partition(":")[0])
        mark = letter.lower() if record.kind == "retry" else letter
        self.counts[mark, record.reason] += 1
        return mark

    def legend(self) -> list[tuple[str, str, int]]:
        """Mark, meaning and number of every reason that was met, most frequent first."""
        return [
            (mark, _meaning(mark, reason), count)
            for (mark, reason), count in self.counts.most_common()
        ]

    def letter(self, cause: str) -> str:
        """The capital letter of a cause: a detector's name, "prefill" or "max_segment"."""
        if cause not in self._letters:
            taken = set(self._letters.values())
            wanted = [*cause.upper(), *_OTHER_LETTERS]
            free = [item for item in wanted if "A" <= item <= "Z" and item not in taken]
            self._letters[cause] = free[0] if free else "X"
        return self._letters[cause]


_MEANINGS = {
    "prefill": "first token of a turn, drawn from the prefill",
    "max_segment": "the segment had reached its longest",
}


def _meaning(mark: str, reason: str) -> str:
    said = _MEANINGS.get(reason, reason)
    return f"{said}; the fast step was run again densely" if mark.islower() else said


@dataclass(slots=True)
class _Character:
    character: str
    style: str
    mark: str = ""
    mark_style: str = ""


def marked_lines(
    tokens: Sequence[ShownToken], marks: ReasonMarks, width: int, glyphs: Glyphs
) -> Iterator[Text]:
    """The text wrapped to a width, each line followed by its row of marks where it has any.

    Args:
        tokens: In order.
        marks: Gives the letters, and counts.
        width: Cells per line, at least 8.
        glyphs: What stands for newlines and control tokens.
    """
    for line in _wrapped(_characters(tokens, marks, glyphs), max(8, width)):
        text, below = Text(), Text()
        for item in line:
            text.append(item.character, item.style)
            cells = cell_len(item.character)
            below.append(item.mark.ljust(cells) if item.mark else " " * cells, item.mark_style)
        text.rstrip()
        below.rstrip()
        yield text
        if below:
            yield below


def _characters(
    tokens: Iterable[ShownToken], marks: ReasonMarks, glyphs: Glyphs
) -> list[_Character]:
    found: list[_Character] = []
    waiting: tuple[str, str] | None = None
    for token in tokens:
        mark, style = marks.mark(token.record), STYLES[token.record.kind]
        if mark:
            waiting = (mark, style)
        shown = glyphs.control if token.is_control else token.text.replace("\n", glyphs.newline)
        for character in shown:
            item = _Character(character, "dim" if token.is_control and not mark else style)
            # Under the token's first visible character, not under the space before a word.
            if waiting is not None and not character.isspace():
                item.mark, item.mark_style = waiting
                waiting = None
            found.append(item)
    while found and found[0].character.isspace():
        del found[0]
    return found


def _wrapped(characters: list[_Character], width: int) -> Iterator[list[_Character]]:
    """Lines of at most `width` cells, broken at spaces where there are any."""
    line: list[_Character] = []
    cells = 0
    for item in characters:
        size = cell_len(item.character)
        if cells + size > width and not item.character.isspace():
            spaces = [index for index, one in enumerate(line) if one.character.isspace()]
            cut = spaces[-1] + 1 if spaces else len(line)
            yield line[:cut]
            line = line[cut:]
            cells = sum(cell_len(one.character) for one in line)
        line.append(item)
        cells += size
    if line:
        yield line
