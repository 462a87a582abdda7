"""What saving a session did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SaveReport"]


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What `session.save` did.

    Attributes:
        bytes_written: Bytes of the files that were written.
        bytes_total: Bytes of all files that the saved session consists of.
        revision: Number of the state in its directory; every save there adds one.
        seconds: Wall-clock time, until everything was on the disk.
    """

    bytes_written: int
    bytes_total: int
    revision: int
    seconds: float
