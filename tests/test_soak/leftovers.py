"""What is left in the process when all sessions are closed."""

from __future__ import annotations

import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any

from sfi_agent import Session
from sfi_agent.engine.history import Buffer
from sfi_agent.engine.memory import LayerMemory

__all__ = ["Leftovers", "resident_bytes"]

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Bytes of memory that the process holds now; where that is not told, the most it ever held."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Leftovers:
    """Finds keys, values and open sessions that were not there at first."""

    def __init__(self) -> None:
        self._known = {id(thing) for thing in _holders()}

    def require_none(self) -> None:
        """Nothing new is open, and nothing new holds keys and values."""
        new = [thing for thing in _holders() if id(thing) not in self._known]
        assert new == [], f"{len(new)} are left: {new[:5]}"


def _holders() -> list[Any]:
    gc.collect()
    found = []
    for thing in gc.get_objects():
        # Not isinstance: some things of other libraries warn when they are asked what they are.
        kind = type(thing)
        if issubclass(kind, (Buffer, LayerMemory)):
            found.append(thing)
        elif issubclass(kind, Session) and thing.status == "open":
            found.append(thing)
    return found
