"""The tools of the office world: plain functions whose results follow from their arguments.

`make_tools(log)` binds `open_log` to one log; the others need nothing but their arguments, so a
test can say what each will return.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["TOOL_NAMES", "check_room", "find_phone", "make_tools", "send_note"]

TOOL_NAMES = ("check_room", "find_phone", "open_log", "send_note")


def check_room(room: int) -> str:
    """Says whether a room is free.

    Args:
        room: Number of the room.
    """
    hour, quarter = 8 + (room * 7) % 10, (room * 13) % 4
    state = "free" if room % 3 else "taken"
    return f"room {room} is {state} until {hour:02d}:{15 * quarter:02d}"


def find_phone(badge: str) -> str:
    """Finds the phone number of a badge.

    Args:
        badge: The badge, four digits.
    """
    return f"phone {10000 + (int(badge) * 7919) % 90000}"


def send_note(badge: str, room: int) -> str:
    """Sends a note to the owner of a badge.

    Args:
        badge: The badge, four digits.
        room: Number of the room to deliver it to.
    """
    return f"note {100 + (int(badge) * 31 + room * 17) % 900} sent"


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
