"""The classes of characters against Unicode's own properties, as the `regex` package knows them."""

from __future__ import annotations

import unicodedata

import pytest
import regex  # type: ignore[import-untyped]

from sfi_policies._characters import CharacterClass, classify

ASSIGNED = [
    chr(code)
    for code in range(0x110000)
    if not 0xD800 <= code < 0xE000 and unicodedata.category(chr(code)) != "Cn"
]
MARKS = {CharacterClass.TERMINATOR, CharacterClass.QUESTION, CharacterClass.FULL_STOP}


def having(prop: str) -> set[str]:
    pattern = regex.compile(rf"\p{{{prop}}}")
    return {letter for letter in ASSIGNED if pattern.match(letter)}


def of_class(*kinds: CharacterClass) -> set[str]:
    return {letter for letter in ASSIGNED if classify(letter) in kinds}


def test_sentence_marks_are_those_of_unicode_and_the_documented_few() -> None:
    ours, theirs = of_class(*MARKS), having("Sentence_Terminal")
    assert theirs <= ours
    assert ours - theirs == set("\u037e\u0f0d\u0f0e\u0f0f\u0f10\u0f11\u0f12\u17d6\u17da")


def test_full_stops_are_those_that_can_be_ambiguous() -> None:
    assert of_class(CharacterClass.FULL_STOP) == having("Sentence_Break=ATerm")


def test_what_carries_a_sentence_on() -> None:
    greek_question_mark = {"\u037e"}
    assert of_class(CharacterClass.CONTINUE) == (
        having("Sentence_Break=SContinue") - greek_question_mark
    )


@pytest.mark.parametrize(
    ("prop", "kind"),
    [
        ("Sentence_Break=Lower", CharacterClass.LOWER),
        ("Sentence_Break=Upper", CharacterClass.UPPER),
        ("Sentence_Break=OLetter", CharacterClass.LETTER),
        ("Sentence_Break=Numeric", CharacterClass.DIGIT),
    ],
)
def test_letters_of_living_scripts_have_the_class_of_unicode(
    prop: str, kind: CharacterClass
) -> None:
    # Circled, superscript and Roman-numeral letters, and signs that modify numbers, differ.
    plain = {
        letter
        for letter in having(prop)
        if unicodedata.category(letter) in {"Lu", "Ll", "Lo", "Nd"}
        and unicodedata.decomposition(letter)[:1] != "<"
    }
    # Georgian capitals, the modifier letters of old orthographies.
    excepted = {letter for letter in plain if classify(letter) is not kind}
    assert len(excepted) <= 48, sorted(excepted)
    assert {"GEORGIAN", "LATIN"} >= {unicodedata.name(letter).split()[0] for letter in excepted}


@pytest.mark.parametrize(
    ("letter", "kind"),
    [
        ("\u10d0", CharacterClass.LETTER),
        ("\u201d", CharacterClass.CLOSER),
        ("\u300c", CharacterClass.OPENER),
        ("\u3000", CharacterClass.SPACE),
        ("\u2028", CharacterClass.NEWLINE),
        ("\r", CharacterClass.IGNORABLE),
        ("\u200f", CharacterClass.IGNORABLE),
        ("\U0001f389", CharacterClass.SYMBOL),
        ("\u2026", CharacterClass.ELLIPSIS),
    ],
)
def test_examples(letter: str, kind: CharacterClass) -> None:
    assert classify(letter) is kind
