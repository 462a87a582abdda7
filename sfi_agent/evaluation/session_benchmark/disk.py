"""A disk without sessions: how fast plain files are written and read on it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sfi_agent.evaluation.session_benchmark.records import DiskFacts

__all__ = [
    "MEMORY_FILE_SYSTEMS",
    "disk_facts",
    "files_of",
    "forget_cached",
    "plain_read",
    "plain_write",
    "settle",
]

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
"""Files there take memory, and their speed says nothing about a disk."""

_BLOCK_BYTES = 1 << 24
_FLUSH_BYTES = 1 << 26
_MOUNTS = Path("/proc/mounts")


def disk_facts(directory: Path) -> DiskFacts:
    """What is known about the disk of a folder that exists."""
    return DiskFacts(str(directory), _file_system(directory), shutil.disk_usage(directory).free)


def plain_write(path: Path, size_bytes: int) -> float:
    """Seconds until a new file of random bytes has reached the disk; the best that plain writing
    can do, so the disk begins to work while more is written."""
    block = memoryview(os.urandom(min(_BLOCK_BYTES, max(1, size_bytes))))
    flush = getattr(os, "fdatasync", os.fsync)
    started = time.perf_counter()
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        left, unflushed, flushes = size_bytes, 0, list[Future[None]]()
        while left:
            written = file.write(block[: min(left, len(block))])
            left, unflushed = left - written, unflushed + written
            if unflushed >= _FLUSH_BYTES:
                flushes.append(pool.submit(flush, file.fileno()))
                unflushed = 0
        for flushed in flushes:
            flushed.result()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def plain_read(paths: list[Path]) -> float:
    """Seconds until all bytes of some files have been in memory, one block over the other."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    started = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - started


def forget_cached(paths: list[Path]) -> bool:
    """Let the system forget files that it may keep in memory; False where that cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # What was not written yet would be kept.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def settle(folder: Path) -> None:
    """Let the disk finish what was removed from a folder, so that nobody pays for what came
    before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_of(directory: Path) -> list[Path]:
    """All files in a folder and below it, in the order of their paths."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _file_system(directory: Path) -> str:
    here = directory.resolve()
    found, longest = "", -1
    for mounted, kind in _mounts():
        if (here == mounted or mounted in here.parents) and len(mounted.parts) >= longest:
            found, longest = kind, len(mounted.parts)
    return found


def _mounts() -> Iterator[tuple[Path, str]]:
    try:
        lines = _MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, place, kind, *_ = line.split()
        # Spaces and tabs are written as octal numbers there.
        yield Path(place.encode().decode("unicode_escape")), kind
