"""Finds the characters that start sentences in a running text, one character at a time.

The rules are those of Unicode Standard Annex #29 (SB rules) where it has them, sharpened for what
models write: abbreviations, list numbers, Markdown, links, citations and tags. A character is
judged when it arrives and never again, so the result does not depend on how the text is cut into
tokens. What this cannot see is meaning: "in the U.S. The" passes for one sentence, and a text
without capitals has no ends at full stops except at line ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from sfi_policies._abbreviations import FullStopMeaning, meaning_of_full_stop
from sfi_policies._characters import CharacterClass, classify

__all__ = ["ScannerState", "SentenceScanner"]

_LONGEST_WORD = 40  # Abbreviations and list numbers are far shorter.
_LONGEST_GROUP = 80  # A citation or a tag behind a mark; a longer one is something else.
_LIST_MARKUP = frozenset("-*+>#|•")
_GROUPS = {"[": "]", "<": ">"}


class _Mark(IntEnum):
    """The mark that may have ended a sentence; of several in a row the strongest counts."""

    FULL_STOP = 0
    ELLIPSIS = 1
    QUESTION = 2
    TERMINATOR = 3


class _Gap(IntEnum):
    """What has come between the mark and the next visible character."""

    NONE = 0
    SPACE = 1
    LINE = 2
    PARAGRAPH = 3


_MARKS = {
    CharacterClass.FULL_STOP: _Mark.FULL_STOP,
    CharacterClass.ELLIPSIS: _Mark.ELLIPSIS,
    CharacterClass.QUESTION: _Mark.QUESTION,
    CharacterClass.TERMINATOR: _Mark.TERMINATOR,
}
_TOUCHING_SYMBOLS = frozenset({CharacterClass.QUOTE, CharacterClass.SYMBOL})


@dataclass(frozen=True, slots=True)
class _Ending:
    """A possible sentence end, waiting for the character that decides.

    Attributes:
        mark: The strongest mark so far.
        meaning: What the full stop means behind its word.
        word: The word with the marks behind it; it goes on if the end is refused.
        after_caseless: The mark follows a letter of a script without case.
        gap: What stands between mark and next character so far.
        closed: A closing quote or bracket has followed the mark.
        group: The character that closes a citation or tag being skipped; empty outside one.
        group_characters: Length of that group so far.
    """

    mark: _Mark
    meaning: FullStopMeaning
    word: str
    after_caseless: bool
    gap: _Gap = _Gap.NONE
    closed: bool = False
    group: str = ""
    group_characters: int = 0

    def with_mark(self, character: str, mark: _Mark) -> _Ending:
        """The same end with one more mark behind the first: "?!", "...", ". . ."."""
        dots = mark is self.mark is _Mark.FULL_STOP
        strongest = _Mark.ELLIPSIS if dots else max(mark, self.mark)
        word = (self.word + character)[-_LONGEST_WORD:]
        return replace(self, mark=strongest, word=word, gap=_Gap.NONE)

    def with_newline(self) -> _Ending:
        """The same end with one more line end behind it."""
        gap = _Gap.PARAGRAPH if self.gap >= _Gap.LINE else _Gap.LINE
        return replace(self, gap=gap, group="")

    def is_confirmed_by(self, character: str, kind: CharacterClass) -> bool:
        """Whether the sentence ended and this visible character starts the next one."""
        if self.meaning is FullStopMeaning.LIST_NUMBER:
            return False
        if self.gap >= _Gap.LINE:
            abbreviation = self.meaning is FullStopMeaning.ABBREVIATION
            return not abbreviation or self.gap is _Gap.PARAGRAPH
        if kind is CharacterClass.CONTINUE:
            return False
        if self.mark is _Mark.TERMINATOR:
            return True
        if self.gap is _Gap.NONE:
            return self._is_confirmed_touching(character, kind)
        return self._is_confirmed_on_the_line(kind)

    def _is_confirmed_touching(self, character: str, kind: CharacterClass) -> bool:
        """Without a space only scripts without case go on; the rest are names and numbers."""
        caseless = kind is CharacterClass.LETTER
        if kind is CharacterClass.OPENER:
            caseless = ord(character) >= 0x3000  # Brackets of East Asian typesetting.
        if self.mark is _Mark.QUESTION:
            return caseless
        return caseless and self.mark is _Mark.FULL_STOP and self.after_caseless

    def _is_confirmed_on_the_line(self, kind: CharacterClass) -> bool:
        """After a space: a lower-case letter carries on, except behind "?" and "!"."""
        if self.mark is _Mark.QUESTION:
            # '"Really?" he asked' carries on; 'what? no' does not.
            return kind is not CharacterClass.LOWER or not self.closed
        if kind is CharacterClass.LOWER:
            return False
        if self.mark is _Mark.ELLIPSIS:
            return kind is CharacterClass.UPPER
        if self.meaning is FullStopMeaning.BEFORE_NUMBER:
            return kind is not CharacterClass.DIGIT
        if self.meaning is FullStopMeaning.MAY_END:
            return kind in (CharacterClass.UPPER, CharacterClass.LETTER)
        return self.meaning is FullStopMeaning.SENTENCE_END


@dataclass(frozen=True, slots=True)
class ScannerState:
    """Everything a scanner remembers; immutable.

    Attributes:
        word: Characters since the last space, without opening brackets and quotes.
        opens_clause: Whether that word is the first of its line or sentence.
        ending: A possible sentence end that waits for its decision.
    """

    word: str = ""
    opens_clause: bool = True
    ending: _Ending | None = None


class SentenceScanner:
    """Reads a text character by character and says which characters start a sentence."""

    __slots__ = ("_ending", "_opens_clause", "_word")

    def __init__(self) -> None:
        self._word = ""
        self._opens_clause = True
        self._ending: _Ending | None = None

    @property
    def state(self) -> ScannerState:
        """What the scanner remembers."""
        return ScannerState(self._word, self._opens_clause, self._ending)

    @state.setter
    def state(self, state: ScannerState) -> None:
        self._word = state.word
        self._opens_clause = state.opens_clause
        self._ending = state.ending

    def drop_ending(self) -> None:
        """Forget a possible sentence end, so that the next character reports nothing."""
        if self._ending is not None:
            self._ending = None
            self._word = ""

    def interrupt(self) -> None:
        """Something that is no text stands here: it ends the line and decides nothing."""
        self._word = ""
        self._opens_clause = True
        if self._ending is not None:
            self._ending = replace(self._ending, gap=_Gap.PARAGRAPH, group="")

    def feed(self, text: str) -> bool:
        """Read some text; True if any of its characters starts a sentence."""
        starts = [self.feed_character(character) for character in text]
        return any(starts)

    def feed_character(self, character: str) -> bool:
        """Read one character; True if it starts a sentence."""
        kind = classify(character)
        if self._ending is None:
            self._read_in_sentence(character, kind)
            return False
        return self._read_behind_mark(self._ending, character, kind)

    def _read_in_sentence(self, character: str, kind: CharacterClass) -> None:
        if kind is CharacterClass.SPACE:
            self._end_word()
        elif kind is CharacterClass.NEWLINE:
            self._word = ""
            self._opens_clause = True
        elif kind in _MARKS:
            self._ending = self._new_ending(character, kind)
        elif self._word or kind not in (CharacterClass.OPENER, CharacterClass.QUOTE):
            self._word = (self._word + character)[-_LONGEST_WORD:]

    def _end_word(self) -> None:
        word = self._word
        if not word:
            return
        is_markup = self._opens_clause and _LIST_MARKUP.issuperset(word)
        self._opens_clause = is_markup or word.endswith((":", "\uff1a"))
        self._word = ""

    def _new_ending(self, character: str, kind: CharacterClass) -> _Ending:
        word = self._word
        meaning = FullStopMeaning.SENTENCE_END
        if kind is CharacterClass.FULL_STOP:
            meaning = meaning_of_full_stop(word, opens_clause=self._opens_clause)
        return _Ending(
            mark=_MARKS[kind],
            meaning=meaning,
            word=word + character,
            after_caseless=bool(word) and classify(word[-1]) is CharacterClass.LETTER,
        )

    def _read_behind_mark(self, ending: _Ending, character: str, kind: CharacterClass) -> bool:
        if kind is CharacterClass.NEWLINE:
            self._ending = ending.with_newline()
        elif ending.group:
            self._skip_in_group(ending, character)
        elif kind is CharacterClass.SPACE:
            self._ending = replace(ending, gap=max(ending.gap, _Gap.SPACE))
        elif kind in _MARKS and ending.gap <= _Gap.SPACE:
            self._ending = ending.with_mark(character, _MARKS[kind])
        elif kind is not CharacterClass.IGNORABLE:
            return self._read_visible(ending, character, kind)
        return False

    def _read_visible(self, ending: _Ending, character: str, kind: CharacterClass) -> bool:
        touching = ending.gap is _Gap.NONE
        if character == "<" or (character == "[" and touching):
            self._ending = replace(ending, group=_GROUPS[character], group_characters=0)
            return False
        if kind is CharacterClass.CLOSER or (touching and _belongs_to_end(ending, character, kind)):
            self._ending = replace(ending, closed=True)
            return False
        return self._decide(ending, character, kind)

    def _skip_in_group(self, ending: _Ending, character: str) -> None:
        length = ending.group_characters + 1
        if character == ending.group:
            # A tag separates like a space (".<br>Then"), a citation does not.
            gap = max(ending.gap, _Gap.SPACE) if character == ">" else ending.gap
            self._ending = replace(ending, group="", closed=True, gap=gap)
        elif length > _LONGEST_GROUP:
            self._ending = None
            self._word = ""
            self._opens_clause = False
        else:
            self._ending = replace(ending, group_characters=length)

    def _decide(self, ending: _Ending, character: str, kind: CharacterClass) -> bool:
        confirmed = ending.is_confirmed_by(character, kind)
        self._ending = None
        if confirmed or ending.gap >= _Gap.LINE:
            self._word = ""
            self._opens_clause = True
        elif ending.gap is _Gap.NONE:
            self._word = ending.word[-_LONGEST_WORD:]
        else:
            self._word = ""
            self._opens_clause = False
        self._read_in_sentence(character, kind)
        return confirmed


def _belongs_to_end(ending: _Ending, character: str, kind: CharacterClass) -> bool:
    """Quotes, Markdown marks, raised numbers and emoji right behind the mark."""
    if kind in _TOUCHING_SYMBOLS:
        return character not in "#$%&+/=@\\^|"  # These go on as a name, a link or a formula.
    # A left double quote closes in German and opens in Chinese, whose marks are terminators.
    return kind is CharacterClass.OPENER and character in "“‘" and ending.mark < _Mark.TERMINATOR
