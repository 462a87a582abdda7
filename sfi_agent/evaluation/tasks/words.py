"""Words, names, numbers and identifiers to build tasks from, all drawn from a generator.

The lists are our own and stand here, so that cases are equal everywhere. Words of one kind have
one length or cannot contain each other, so that a right word is never found inside a wrong one.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Iterator

from sfi_agent.errors import InputError, explain

__all__ = [
    "ADJECTIVES",
    "NOUNS",
    "VERBS",
    "Draws",
    "code_group_key",
    "distinct",
    "letters",
    "pseudo_word",
    "seven_digits",
    "two_words",
    "uuid_text",
]

ADJECTIVES = tuple(
    """amber ancient autumn azure bitter blue bold brass brave bright brisk broad bronze busy calm
    candid careful cheerful chilly civic clean clear clever coastal cobalt common copper coral cosy
    crimson crisp curious daring dark deep dense distant double dry dusty eager early eastern easy
    elder electric empty even faint fair famous fancy fast fertile final fine firm first fluent
    foggy fond formal frank free fresh frosty full gentle gifted glad glossy golden grand grave
    green grey happy hardy hasty hazel heavy hidden high hollow honest humble humid icy ideal idle
    inner ivory jolly keen kind large late lazy light lilac little lively local lonely long loud
    lucky lunar major marble mellow merry mild minor misty modern modest mossy muddy narrow near
    neat new nimble noble northern novel olive open orange outer pale patient placid plain pleasant
    polite proud public pure purple quaint quick quiet rapid rare ready regal remote rich rigid
    ripe robust rough round royal ruby rural rusty salty scarlet serene shady sharp short shy
    silent silver simple sincere sleepy slender slim slow small smooth snowy sober soft solar solid
    southern sparse spicy stable stark steady steep still stony stout strict strong sturdy subtle
    sunny super swift tall tame teal tender thin thirsty tidy tiny tired tough tranquil true upper
    urban useful vague vast velvet violet vital vivid warm wary western white wide wild windy wise
    witty wooden yellow young zealous""".split()
)
NOUNS = tuple(
    """acorn actor agenda airport alley anchor answer apple apron arch arena arrow atlas attic
    avenue axle badge bakery balcony ballad bamboo banjo barrel basin basket beach beacon bench
    berry bicycle biscuit blanket blossom board boat border bottle boulder branch brewery brick
    bridge brook broom bucket buckle button cabin cable camera canal candle canoe canyon captain
    carpet castle cedar cellar chapel cherry chimney circle citizen cliff clinic clock cloud coat
    coffee column comet compass concert cook corner cottage cotton county courier cousin crane
    crate creek crown cupboard curtain cushion dairy dancer desert desk diary dinner doctor dragon
    drawer driver drum eagle editor elbow elm engine estate evening fabric factory falcon farmer
    feather fence ferry fiddle field finch flag flute forest forge fountain fox frame galaxy garden
    gate ginger glacier glove goose gorge grain granite guitar hammer harbor harvest hedge helmet
    heron hill hinge horizon hotel iceberg inlet island jacket jar jewel journal jungle kettle
    kitchen kite ladder lagoon lamp lantern lawyer leaf ledger lemon letter library lily linen
    lizard lobby lotus magnet mango map maple market meadow medal melon mirror monk moon morning
    mosaic motor mountain museum needle nest notebook oasis oboe ocean office onion orchard organ
    otter oven owl paddle palace panther paper parade parcel park parrot pasture path peach pebble
    pencil pepper piano pigeon pilot pine pirate planet pocket poet pond poplar porch potter prairie
    puzzle pyramid quarry quilt rabbit radio railway rainbow raven recipe ribbon river road robin
    rocket roof rope rose saddle sailor salad sandal school sculptor shadow shelf shepherd shore
    signal singer sketch sparrow spoon spring square stable stadium stairs station statue stove
    stream street student studio summer sunset table tailor teacher temple theater thimble thunder
    ticket tiger tower trader trail train tunnel turtle uncle valley vase village violin voyage
    wagon walnut wardrobe watch waterfall weaver whale wheel willow window winter wolf workshop
    writer yard zebra""".split()
)
VERBS = tuple(
    """carried checked cleaned collected counted covered crossed described drew examined filled
    fixed found gathered guarded heard helped kept left lifted liked mentioned missed moved noticed
    opened ordered packed painted passed photographed planned praised prepared pushed reached read
    remembered repaired returned sold searched showed sketched sorted stored studied trusted
    visited washed watched weighed welcomed wrapped""".split()
)

_ONSETS = "b d f g k l m n p r s t v z".split()
_VOWELS = "a e i o u".split()
_CODE_CHARACTERS = string.ascii_lowercase + string.digits


def two_words(rng: random.Random) -> str:
    """A name such as "amber-acorn"."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def pseudo_word(rng: random.Random) -> str:
    """A word that does not exist and can be said: four syllables, eight letters."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(4))


def seven_digits(rng: random.Random) -> str:
    """A number of seven digits without a leading zero."""
    return str(rng.randint(1_000_000, 9_999_999))


def uuid_text(rng: random.Random) -> str:
    """A version 4 UUID out of the generator's bits."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """So many random characters of an alphabet."""
    return "".join(rng.choice(alphabet) for _ in range(count))


def code_group_key(rng: random.Random) -> str:
    """Four groups of eight letters and digits, joined by dashes."""
    return "-".join(letters(rng, 8, _CODE_CHARACTERS) for _ in range(4))


def distinct(draw: Callable[[random.Random], str], rng: random.Random) -> Iterator[str]:
    """Endless draws, each of them once.

    Raises:
        InputError: Nothing new came for a long time: there are no more.
    """
    seen: set[str] = set()
    while True:
        for _ in range(1000):
            text = draw(rng)
            if text not in seen:
                break
        else:
            raise InputError(
                explain(
                    "drew distinct words for a case",
                    got=f"{len(seen)} words and then no new one",
                    remedy="ask for fewer context_tokens",
                )
            )
        seen.add(text)
        yield text


class Draws:
    """The first draws of an endless iterator, kept: asking for more never changes the earlier.

    Cases of several sizes are tried until one fits; all of them begin with the same units.
    """

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._drawn: list[str] = []

    def first(self, count: int) -> list[str]:
        """The first `count` draws (a copy)."""
        while len(self._drawn) < count:
            self._drawn.append(next(self._source))
        return self._drawn[:count]
