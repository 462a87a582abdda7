"""What commands say about the machine that a number was measured on."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["command_line", "machine_facts"]


def machine_facts(device: str, threads: int) -> dict[str, Any]:
    """Device, its name and memory, and the versions that matter; None for what is not there."""
    import torch

    on_cuda = device.startswith("cuda")
    memory = torch.cuda.get_device_properties(device).total_memory if on_cuda else None
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "device_memory_bytes": memory,
        "threads": threads,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "sfi_agent": _version("sfi-agent"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def command_line() -> str:
    """How this process was called."""
    return shlex.join(["sfi-agent", *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
