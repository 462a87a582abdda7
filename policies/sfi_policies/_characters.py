"""Classes of characters, as far as sentence ends depend on them.

The classes follow the Sentence_Break property of Unicode Standard Annex #29 (section 5) where it
helps, and general categories elsewhere. Two sets are written out because the standard library
does not know them: Sentence_Terminal (PropList.txt of Unicode 16) and SContinue (UAX #29).
"""

from __future__ import annotations

import unicodedata
from enum import Enum, auto
from functools import lru_cache

__all__ = ["CharacterClass", "classify"]


class CharacterClass(Enum):
    """What a character means for the end and the start of sentences."""

    SPACE = auto()
    """Stays on the line."""
    NEWLINE = auto()
    """Ends the line."""
    FULL_STOP = auto()
    """Ends a sentence, an abbreviation, or stands in a number or a name."""
    ELLIPSIS = auto()
    """Trails off: at the end of a sentence or within it."""
    QUESTION = auto()
    """ASCII question and exclamation marks, which also occur in code, links and dialogue."""
    TERMINATOR = auto()
    """Every other sentence mark: it ends a sentence whatever follows."""
    CLOSER = auto()
    """Closing brackets and quotes: belong to the sentence before."""
    OPENER = auto()
    """Opening brackets and quotes: belong to the sentence after."""
    QUOTE = auto()
    """Straight quotes and Markdown marks: closing next to what is before, opening otherwise."""
    CONTINUE = auto()
    """Commas, dashes, colons: on the same line they carry on the sentence."""
    DIGIT = auto()
    UPPER = auto()
    LOWER = auto()
    LETTER = auto()
    """A letter of a script without case."""
    SYMBOL = auto()
    """Everything else that is visible."""
    IGNORABLE = auto()
    """Combining marks and format characters: belong to the character before."""


_FULL_STOPS = ".\u2024\ufe52\uff0e"  # ATerm of UAX #29.
_ELLIPSES = "\u2025\u2026\u22ef"
_QUESTIONS = "?!"
_QUOTES = "\"'`*_~"
_NEWLINES = "\n\v\f\x85\u2028\u2029"
_SPACES = " \t"
_OPENERS = "¿¡"
_CONTINUES = (
    ",-:;\u055d\u060c\u060d\u07f8\u1802\u1808\u2013\u2014\u3001\ufe10\ufe11\ufe13\ufe14\ufe31"
    "\ufe32\ufe50\ufe51\ufe54\ufe55\ufe58\ufe63\uff0c\uff0d\uff1a\uff1b\uff64"
)
_SENTENCE_TERMINAL = (
    "0021 002E 003F 0589 061D-061F 06D4 0700-0702 07F9 0837 0839 083D-083E 0964-0965 104A-104B "
    "1362 1367-1368 166E 1735-1736 17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B "
    "1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 2024 203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C "
    "2E53-2E54 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F "
    "AAF0-AAF1 ABEB FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59 "
    "10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 "
    "1123B-1123C 112A9 113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E "
    "11944 11946 11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 "
    "16B37-16B38 16B44 16D6E-16D6F 16E98 1BC9F 1DA88"
)
# Marks that end sentences though Unicode does not list them: the Greek question mark (it looks
# like a semicolon and has a code point of its own), the Tibetan shad family, and the Khmer
# section and end marks.
_OTHER_TERMINATORS = "037E 0F0D-0F12 17D6 17DA"

# Lower-case by category, but sentences begin with them (UAX #29 excepts them from Lower too).
_GEORGIAN = "10D0-10FA 10FD-10FF"


def _code_points(ranges: str) -> frozenset[str]:
    found: set[str] = set()
    for entry in ranges.split():
        first, _, last = entry.partition("-")
        found.update(map(chr, range(int(first, 16), int(last or first, 16) + 1)))
    return frozenset(found)


_BY_CHARACTER: dict[str, CharacterClass] = {
    **dict.fromkeys(_code_points(_OTHER_TERMINATORS), CharacterClass.TERMINATOR),
    **dict.fromkeys(_code_points(_SENTENCE_TERMINAL), CharacterClass.TERMINATOR),
    **dict.fromkeys(_FULL_STOPS, CharacterClass.FULL_STOP),
    **dict.fromkeys(_ELLIPSES, CharacterClass.ELLIPSIS),
    **dict.fromkeys(_QUESTIONS, CharacterClass.QUESTION),
    **dict.fromkeys(_QUOTES, CharacterClass.QUOTE),
    **dict.fromkeys(_NEWLINES, CharacterClass.NEWLINE),
    **dict.fromkeys(_SPACES, CharacterClass.SPACE),
    **dict.fromkeys(_CONTINUES, CharacterClass.CONTINUE),
    **dict.fromkeys(_OPENERS, CharacterClass.OPENER),
    **dict.fromkeys(_code_points(_GEORGIAN), CharacterClass.LETTER),
}
_BY_CATEGORY: dict[str, CharacterClass] = {
    "Lu": CharacterClass.UPPER,
    "Lt": CharacterClass.UPPER,
    "Ll": CharacterClass.LOWER,
    "Lo": CharacterClass.LETTER,
    "Lm": CharacterClass.LETTER,
    "Nl": CharacterClass.LETTER,
    "Nd": CharacterClass.DIGIT,
    "Ps": CharacterClass.OPENER,
    "Pi": CharacterClass.OPENER,
    "Pe": CharacterClass.CLOSER,
    "Pf": CharacterClass.CLOSER,
    "Zs": CharacterClass.SPACE,
    "Zl": CharacterClass.NEWLINE,
    "Zp": CharacterClass.NEWLINE,
    "Mn": CharacterClass.IGNORABLE,
    "Me": CharacterClass.IGNORABLE,
    "Mc": CharacterClass.IGNORABLE,
    "Cf": CharacterClass.IGNORABLE,
    "Cc": CharacterClass.IGNORABLE,
}


@lru_cache(maxsize=8192)
def classify(character: str) -> CharacterClass:
    """The class of one character."""
    known = _BY_CHARACTER.get(character)
    if known is not None:
        return known
    return _BY_CATEGORY.get(unicodedata.category(character), CharacterClass.SYMBOL)
