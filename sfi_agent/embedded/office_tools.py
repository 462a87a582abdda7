"""The tools of the office world: plain functions whose results follow from their arguments.

`make_tools(log)` binds `open_log` to one log; the others need nothing but their arguments, so a
test can say what each will return. All numbers have three digits.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["TOOL_NAMES", "check_room", "find_phone", "make_tools", "send_note"]

TOOL_NAMES = ("check_room", "find_phone", "open_log", "send_note")


def check_room(room: int) -> str:
    """Says when a room empties.

    Args:
        room: Number of the room.
    """
    return f"room {room} empties at {100 + (room * 457) % 900}"


def find_phone(badge: int) -> str:
    """Finds the phone number of a badge.

    Args:
        badge: Number of the badge.
    """
    return f"badge {badge} gets phone {100 + (badge * 619) % 900}"


def send_note(badge: int, room: int) -> str:
    """Sends a note to the owner of a badge.

    Args:
        badge: Number of the badge.
        room: Number of the room.
    """
    return f"badge {badge} gets note {100 + (badge * 31 + room * 17) % 900}"


def make_tools(log: str) -> list[Callable[..., str]]:
    """All four tools, `open_log` returning the given log, sorted by name."""

    def open_log(day: str) -> str:
        """Opens the office log of a day.

        Args:
            day: The day of the week.
        """
        if f"log of {day}:" not in log.split("\n", 1)[0]:
            raise ValueError(f"there is no log of {day}")
        return log

    return [check_room, find_phone, open_log, send_note]
