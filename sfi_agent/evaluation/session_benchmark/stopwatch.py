"""How long something takes until the device has done it, and what it leaves in memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["Growth", "Stopwatch"]

_STATUS = Path("/proc/self/statm")
_PAGE_FIELD = 1
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory that was taken between two moments and not given back.

    Attributes:
        tensor_bytes: Of tensors: all storages that are alive (CPU), or what torch has allocated
            on the device (CUDA).
        resident_bytes: Of the process, in pages, whatever they hold; None where the system does
            not say.
    """

    tensor_bytes: int
    resident_bytes: int | None


class Stopwatch:
    """Reads the clock on the wall when the device has done what it was given.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def time(self, action: Callable[[], _Result]) -> tuple[float, _Result]:
        """Seconds that an action takes, and what it gives."""
        started = self.now()
        result = action()
        return self.now() - started, result

    def growth(self, action: Callable[[], _Result]) -> tuple[Growth, _Result]:
        """Memory that an action takes, and what it gives. Looks at every object of the process,
        so it is never timed."""
        tensors, resident = self._tensor_bytes(), _resident_bytes()
        result = action()
        grown, now_resident = self._tensor_bytes(), _resident_bytes()
        pages = None if resident is None or now_resident is None else now_resident - resident
        return Growth(grown - tensors, pages), result

    def _tensor_bytes(self) -> int:
        gc.collect()
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        storages: dict[int, int] = {}
        for found in gc.get_objects():
            # By its exact type: asking stand-ins for their class may import what they stand for.
            if type(found) in (torch.Tensor, torch.nn.Parameter):
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def _resident_bytes() -> int | None:
    try:
        pages = int(_STATUS.read_text(encoding="utf-8").split()[_PAGE_FIELD])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()
