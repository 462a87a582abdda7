"""Words of the office-log world: names, values, fields and phrases.

Easy names are two syllables, `FIRST_SYLLABLES` x `SECOND_SYLLABLES`; each is one token of the
embedded tokenizer when a space stands before it. Hard names are two words of three syllables,
drawn from the same syllables, and take several tokens. Names and values are free to combine, so
nothing about a person can be known without reading the log.

Knows nothing about tokens, models or files.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CITIES",
    "DAYS",
    "DEPARTMENTS",
    "EASY_PERSON_NAMES",
    "EASY_PROJECT_NAMES",
    "FIRST_SYLLABLES",
    "LAST_SYLLABLES",
    "MONTHS",
    "PERSON_FIELDS",
    "PHASES",
    "PROJECT_FIELDS",
    "SECOND_SYLLABLES",
    "Field",
]


@dataclass(frozen=True, slots=True)
class Field:
    """One kind of fact.

    Attributes:
        key: Name used in `Entity.facts`.
        noun: How a question asks for it.
        phrase: Words before the value, starting with a space.
        values: Closed list of values; empty for numbers and links.
        digits: Length of a number value; 0 for words and links.
        link: "person" or "project" where the value names another entry of the log, else "".
    """

    key: str
    noun: str
    phrase: str
    values: tuple[str, ...] = ()
    digits: int = 0
    link: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_SYLLABLES = _words(
    "Mar Tov Lin Bel Kor Dan Fen Gal Hol Jas Kel Lor Mil Nor Pet Ros Sal Tam Ul Vel Wen Yor Zan "
    "Bra Cas Del Er Fal Gor Hes Il Jor"
)
SECOND_SYLLABLES = _words("a ek in o is ul an et ia os")
LAST_SYLLABLES = _words("ko dar vin les mo ran bit sen gu pol ti nas")

EASY_PERSON_NAMES = tuple(a + b for a in FIRST_SYLLABLES for b in SECOND_SYLLABLES)
EASY_PROJECT_NAMES = _words(
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
    Field("department", "department", " works in", DEPARTMENTS),
    Field("room", "room", " sits in room", digits=3),
    Field("manager", "manager", " reports to", link="person"),
    Field("cover", "cover", " is covered by", link="person"),
    Field("project", "project", " leads project", link="project"),
    Field("badge", "badge", " keeps badge", digits=4),
    Field("city", "city", " lives in", CITIES),
    Field("month", "starting month", " started in", MONTHS),
)
PROJECT_FIELDS = (
    Field("site", "site", " runs in", CITIES),
    Field("deadline", "deadline", " is due in", MONTHS),
    Field("budget", "budget", " has budget", digits=4),
    Field("backer", "backer", " is backed by", link="person"),
    Field("phase", "phase", " is now in", PHASES),
)
