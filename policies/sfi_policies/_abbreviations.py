"""Words that end in a full stop without ending a sentence, and how sure that is.

Chosen to be few: a missed sentence end costs little (`refresh.max_segment_tokens` opens a slow
step anyway), a false one costs a slow step, and a list that knows every abbreviation of every
language would swallow ordinary words ("no", "art", "sun").
"""

from __future__ import annotations

import re
from enum import Enum, auto

__all__ = ["FullStopMeaning", "meaning_of_full_stop"]


class FullStopMeaning(Enum):
    """What a full stop behind a certain word can be."""

    SENTENCE_END = auto()
    """An ordinary word: the sentence ends, unless what follows says otherwise."""
    LIST_NUMBER = auto()
    """A list's "1." or "b." at the start of a line or sentence: never an end."""
    ABBREVIATION = auto()
    """As in "Dr.", "e.g." and initials: an end only if a blank line follows."""
    BEFORE_NUMBER = auto()
    """As in "No. 5": an abbreviation if digits follow, an ordinary word otherwise."""
    MAY_END = auto()
    """As in "etc." and "p.m.": an end if a capital or a letter without case follows."""


# Titles count with a capital only: "rep", "gen" and "col" are words or names of things.
_TITLES = frozenset(
    "Mr Mrs Ms Mx Dr Drs Prof Rev Fr Sr Sra Srta Dra Hr Mme Mlle MM Messrs St Ste Mt Ft Gen Col "
    "Maj Capt Cmdr Cpt Lt Sgt Cpl Pvt Adm Gov Sen Rep Pres Hon Supt Insp Dipl Ing Mag".split()
)
_ABBREVIATIONS = frozenset(
    "vs cf eg ie viz ibid resp approx dept incl excl dr prof bzw ca evtl ggf vgl inkl exkl bspw "
    "ср ул проф акад напр".split()
)
_BEFORE_NUMBER = frozenset(
    "no nos nr fig figs eq eqs sec secs ch chap art vol vols pp pg p nº núm núms § abs bd min max "
    "jan feb mar apr jun jul aug sep sept oct nov dec tel ext ver v рис табл стр".split()
)
_MAY_END = frozenset(
    "etc inc ltd co corp llc bros jr sr esq al ph.d m.sc b.sc m.a b.a m.d a.m p.m a.d b.c usw "
    "u.a u.s.w uvm см др пр т.д т.п гг г".split()
)
_DOTTED_LETTERS = re.compile(r"[^\W\d_](?:\.[^\W\d_])+")
_NUMERAL = r"\d{1,3}(?:\.\d{1,3})*"
_SINGLE_LETTER = r"[A-Za-z\u0400-\u04ff]"
_ROMAN = r"(?=[IVX])X{0,3}(?:IX|IV|V?I{0,3})"
_LIST_NUMBER = re.compile(f"{_NUMERAL}|{_SINGLE_LETTER}|{_ROMAN}|{_ROMAN.lower()}")


def meaning_of_full_stop(word: str, *, opens_clause: bool) -> FullStopMeaning:
    """What a full stop right behind `word` means, before what follows is known.

    Args:
        word: The characters since the last space, without opening brackets and quotes; may hold
            full stops ("e.g").
        opens_clause: Whether the word is the first of its line or sentence, or follows a colon.
    """
    if opens_clause and _LIST_NUMBER.fullmatch(word):
        return FullStopMeaning.LIST_NUMBER
    lowered = word.lower()
    if lowered in _MAY_END:
        return FullStopMeaning.MAY_END
    if word in _TITLES or lowered in _ABBREVIATIONS or _DOTTED_LETTERS.fullmatch(word):
        return FullStopMeaning.ABBREVIATION
    # A single capital is an initial; "I" is far more often the pronoun.
    if len(word) == 1 and word.isupper() and word != "I":
        return FullStopMeaning.ABBREVIATION
    if lowered in _BEFORE_NUMBER:
        return FullStopMeaning.BEFORE_NUMBER
    return FullStopMeaning.SENTENCE_END
