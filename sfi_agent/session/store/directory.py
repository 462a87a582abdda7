"""The folder of a saved session: every touch of the file system is here.

A state is written as new files, and becomes the state of the folder by one rename. So whatever
interrupts a save leaves the old state or the new one, and files that neither of them names; those
go with the next save. Only files with our names are ever removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfi_agent.errors import InputError, StoreConflictError, StoreError, explain

__all__ = ["MANIFEST_NAME", "SHARD_NAME", "StoreDirectory", "directory_path", "write_all"]

MANIFEST_NAME = "sfi-session.json"
SHARD_NAME = r"^sfi-history-[0-9a-f]{32}\.safetensors$"
_NEW_MANIFEST_NAME = f"{MANIFEST_NAME}.new"
_SHARD = re.compile(SHARD_NAME)

_ONLY_A_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Neither follows a link nor waits for the other end of a pipe."""


def directory_path(given: object) -> Path:
    """What a caller names as a directory.

    Raises:
        InputError: It is no path.
    """
    if isinstance(given, (str, os.PathLike)) and isinstance(os.fspath(given), str):
        if os.fspath(given) and "\0" not in os.fspath(given) and _can_be_a_name(Path(given)):
            return Path(given)
    raise InputError(
        explain("named a directory of a session", got=repr(given), allowed="a path as text or Path")
    )


class StoreDirectory:
    """An open folder. Renaming it meanwhile makes no difference.

    Args:
        path: For messages, and to be known by.
        descriptor: Of the open folder.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path, *, create: bool = False) -> Iterator[StoreDirectory]:
        """Open a folder for the length of a with block, and make it if that is asked for.

        Raises:
            OSError: It is no folder, or cannot be made.
        """
        if create:
            _make(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    @property
    def key(self) -> str:
        """The folder's real path."""
        return os.path.realpath(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who saves here.

        Raises:
            StoreConflictError: Somebody else is saving.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreConflictError(
                explain(
                    f"saved a session to {self.path}",
                    got="another save into it still under way",
                    allowed="one save at a time per directory",
                    remedy="wait for it, or save to a directory of your own",
                )
            ) from error
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    @contextmanager
    def reading(self, name: str) -> Iterator[tuple[int, int]]:
        """Descriptor and length of a file of the folder.

        Raises:
            FileNotFoundError: There is none.
            StoreError: It is a link, a folder, a pipe or a device.
        """
        try:
            descriptor = os.open(name, os.O_RDONLY | _ONLY_A_FILE, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._no_file(name, str(error)) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise self._no_file(name, "something that is no plain file")
            yield descriptor, found.st_size
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int | None:
        """Length of a plain file; None if there is none of this name."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    @contextmanager
    def new_shard(self) -> Iterator[tuple[str, int]]:
        """Name and descriptor of a new file, to write to; it is removed if the block raises."""
        name = f"sfi-history-{secrets.token_hex(16)}.safetensors"
        descriptor = self._create(name)
        try:
            yield name, descriptor
        except BaseException:
            self.remove(name)
            raise
        finally:
            os.close(descriptor)

    def replace_manifest(self, data: bytes) -> None:
        """Make `data` the manifest: from then on the folder has another state."""
        with suppress(FileNotFoundError):
            os.unlink(_NEW_MANIFEST_NAME, dir_fd=self._descriptor)
        descriptor = self._create(_NEW_MANIFEST_NAME)
        try:
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            # The shards are found after a power failure before anything names them.
            os.fsync(self._descriptor)
            folder = {"src_dir_fd": self._descriptor, "dst_dir_fd": self._descriptor}
            os.replace(_NEW_MANIFEST_NAME, MANIFEST_NAME, **folder)
        except BaseException:
            self.remove(_NEW_MANIFEST_NAME)
            raise
        os.fsync(self._descriptor)

    def remove(self, name: str) -> None:
        """Remove a file of ours, if it can be done: what stays does no harm."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove_all_but(self, names: Collection[str]) -> None:
        """Remove the shards that no state names any more, those of interrupted saves too."""
        with suppress(OSError):
            for name in os.listdir(self._descriptor):
                if _SHARD.fullmatch(name) and name not in names and self.size(name) is not None:
                    self.remove(name)

    def _create(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _ONLY_A_FILE
        return os.open(name, flags, 0o666, dir_fd=self._descriptor)

    def _no_file(self, name: str, got: str) -> StoreError:
        attempted = f"opened {self.path / name}"
        return StoreError(explain(attempted, got=got, allowed="a plain file"))


def write_all(descriptor: int, *pieces: bytes | memoryview) -> None:
    """Write everything, however often the system takes only a part."""
    left = [memoryview(piece) for piece in pieces]
    while left:
        count = os.writev(descriptor, left)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]


def _can_be_a_name(path: Path) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _make(path: Path) -> None:
    """Make a folder and what is missing above it, to be found again after a power failure."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
