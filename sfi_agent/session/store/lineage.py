"""What a session knows of the directories it was saved to or loaded from.

How many tokens of a directory are still a session's own cannot be seen from ids: under observe keys
and values depend on the steps that were taken. So it is remembered, from one save to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Lineage", "SavedPlace"]


@dataclass(frozen=True, slots=True)
class SavedPlace:
    """A directory as a session left or found it.

    Attributes:
        save_id: Names the state that was written.
        kept_tokens: How many of its keys and values the session has not given up since.
    """

    save_id: str
    kept_tokens: int


class Lineage:
    """The places of one session, by directory. A fork takes them along."""

    def __init__(self) -> None:
        self._places: dict[str, SavedPlace] = {}

    def knows(self, directory: str) -> bool:
        """Whether the session was saved to, or loaded from, this directory (its real path)."""
        return directory in self._places

    def kept_tokens(self, save_id: str) -> int | None:
        """Tokens of a state that are still the session's; None if it is none of its states."""
        found = [place for place in self._places.values() if place.save_id == save_id]
        # A directory may be known under two names; what it holds is the same.
        return min((place.kept_tokens for place in found), default=None)

    def note_saved(self, directory: str, save_id: str, tokens: int) -> None:
        """The directory holds the session's first `tokens` keys and values now."""
        self._places[directory] = SavedPlace(save_id, tokens)

    def note_cut(self, tokens: int) -> None:
        """The session gives up every key and value from position `tokens` on."""
        for directory, place in self._places.items():
            if place.kept_tokens > tokens:
                self._places[directory] = replace(place, kept_tokens=tokens)

    def copy(self) -> Lineage:
        """The same places, for a session that goes its own way from here."""
        other = Lineage()
        other._places = dict(self._places)
        return other
