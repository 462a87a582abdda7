"""Words of the office-log world: names, values, fields and phrases.

Names are two syllables, `FIRST_SYLLABLES` x `SECOND_SYLLABLES`. Every name, every value and every
number is one token of the embedded tokenizer when a space stands before it. Names and values are
free to combine, so nothing about a person can be known without reading the log.

Knows nothing about tokens, models or files.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CITIES",
    "DAYS",
    "DEPARTMENTS",
    "FIRST_SYLLABLES",
    "MONTHS",
    "NUMBERS",
    "PERSON_FIELDS",
    "PERSON_NAMES",
    "PHASES",
    "PROJECT_FIELDS",
    "PROJECT_NAMES",
    "RESULT_FIELDS",
    "SECOND_SYLLABLES",
    "Field",
]


@dataclass(frozen=True, slots=True)
class Field:
    """One kind of fact.

    Attributes:
        key: Name used in `Entity.facts`.
        noun: How a question asks for it; one word.
        phrase: The two words before the value, each starting with a space. No two fields of one
            kind of entry share either word's place, so the word before a value names the field.
        values: Closed list of values; empty for numbers and links.
        number: Whether the value is one of `NUMBERS`.
        link: "person" or "project" where the value names another entry of the log, else "".
    """

    key: str
    noun: str
    phrase: tuple[str, str]
    values: tuple[str, ...] = ()
    number: bool = False
    link: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_SYLLABLES = _words(
    "Mar Tov Lin Bel Kor Dan Fen Gal Hol Jas Kel Lor Mil Nor Pet Ros Sal Tam Ul Vel Wen Yor Zan "
    "Bra Cas Del Er Fal Gor Hes Il Jor"
)
SECOND_SYLLABLES = _words("a ek in o is ul an et ia os")
PERSON_NAMES = tuple(a + b for a in FIRST_SYLLABLES for b in SECOND_SYLLABLES)
PROJECT_NAMES = _words(
    "Atlas Beacon Comet Delta Ember Falcon Garnet Harbor Iris Jasper Kestrel Lantern Meteor "
    "Nimbus Orchid Pepper Quartz Raven Saffron Temple Umbra Violet Walnut Xenon Yarrow Zephyr "
    "Anchor Bridge Cedar Dolphin Echo Forest Glacier Hammer Island Jungle Kettle Ladder Mirror "
    "Needle Oyster Pebble Quiver Rocket Shadow Tunnel Urchin Valley Willow Yellow Zebra Arrow "
    "Bronze Candle Drum Engine Flint Gravel Hollow Ivory"
)
DEPARTMENTS = _words(
    "finance sales legal support design research security logistics payroll training marketing "
    "archive reception purchasing planning insurance export catering housing quality"
)
CITIES = _words(
    "Lyon Porto Genoa Bergen Malmo Ghent Krakow Turin Basel Graz Leeds Cork Bilbao Riga Tartu "
    "Split Brno Lodz Nice Bonn Essen Parma Seville Utrecht"
)
MONTHS = _words(
    "January February March April May June July August September October November December"
)
PHASES = _words("drafting building testing launch review closing")
DAYS = _words("monday tuesday wednesday thursday friday")

PERSON_FIELDS = (
    Field("department", "department", (" works", " for"), DEPARTMENTS),
    Field("room", "room", (" uses", " room"), number=True),
    Field("manager", "manager", (" reports", " to"), link="person"),
    Field("cover", "cover", (" swaps", " with"), link="person"),
    Field("project", "project", (" leads", " project"), link="project"),
    Field("badge", "badge", (" keeps", " badge"), number=True),
    Field("city", "city", (" lives", " in"), CITIES),
    Field("month", "month", (" started", " around"), MONTHS),
)
PROJECT_FIELDS = (
    Field("site", "site", (" runs", " near"), CITIES),
    Field("deadline", "deadline", (" closes", " before"), MONTHS),
    Field("budget", "budget", (" has", " budget"), number=True),
    Field("backer", "backer", (" relies", " on"), link="person"),
    Field("phase", "phase", (" is", " now"), PHASES),
)
RESULT_FIELDS = (
    Field("phone", "phone", (" gets", " phone"), number=True),
    Field("place", "place", (" empties", " at"), number=True),
    Field("note", "note", (" gets", " note"), number=True),
)
"""What tools say about a badge or a room."""

NUMBERS = tuple(str(number) for number in range(100, 1000))
"""Every number of the world; with the space before it, each is one token."""
