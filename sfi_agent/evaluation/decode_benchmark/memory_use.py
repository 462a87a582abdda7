"""Peak and present memory of a device or of this process, and giving back what nobody uses."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path

import torch

__all__ = ["begin_peak", "give_back", "peak_bytes"]

_PROCESS_STATUS = Path("/proc/self/status")


def peak_bytes(device: torch.device) -> int:
    """Most that was allocated (CUDA) or resident (CPU) since `begin_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _PROCESS_STATUS.exists():
        line = next(
            line for line in _PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:")
        )
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def begin_peak(device: torch.device) -> int:
    """What is taken now, from where the peak counts; on a CPU elsewhere than on Linux the peak so
    far."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # 5 sets the peak back to what is resident (proc(5)); a container may forbid it.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def give_back(device: torch.device) -> None:
    """Return what is no longer used to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
