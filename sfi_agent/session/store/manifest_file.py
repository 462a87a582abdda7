"""The manifest as a file: sealed with a digest, versioned, and read with suspicion."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from pydantic import ValidationError

from sfi_agent.errors import StoreError, explain
from sfi_agent.session.store import strict_json
from sfi_agent.session.store.directory import MANIFEST_NAME, StoreDirectory
from sfi_agent.session.store.manifest import SavedSession

__all__ = ["FORMAT_VERSION", "damaged", "manifest_bytes", "parse_manifest", "read_manifest"]

FORMAT_VERSION = 1
_FORMAT = "sfi-agent session"
_AFTER = b"}\n"
_LARGEST_BYTES = 1 << 28
"""Of a manifest. A million tokens with their texts and records take a third of it."""
_MOST_MARKS = 1 << 22
"""Of lists, mappings and keys, also in texts: each of them takes twenty times its bytes in memory.
A million tokens of nothing but JSON have less than a quarter of it."""
_MOST_DESCRIBED = 1000
"""Errors; describing one takes as long as finding ten."""
_BEGINNING = re.compile(
    rb'\s*\{\s*"format"\s*:\s*"'
    + _FORMAT.encode()
    + rb'"\s*,\s*"format_version"\s*:\s*(\d{1,18})\s*[,}]'
)
"""Of every manifest, also of those in formats to come."""


def manifest_bytes(saved: SavedSession) -> bytes:
    """The file's content. What it says can be read back: that is tried.

    Raises:
        StoreError: It cannot, or it would be larger than what is read.
    """
    content = strict_json.compact(saved.model_dump(mode="json"))
    _check_amount(content, Path(MANIFEST_NAME))
    _content(content, Path(MANIFEST_NAME))
    data = _sealed(content)
    if len(data) > _LARGEST_BYTES:
        raise StoreError(
            explain(
                "wrote the manifest of a session",
                got=f"{len(data)} bytes of ids, messages and records",
                allowed=f"{_LARGEST_BYTES} bytes",
            )
        )
    return data


def read_manifest(directory: StoreDirectory) -> bytes:
    """The manifest of a folder, as it is.

    Raises:
        FileNotFoundError: There is none.
        StoreError: It is no plain file, or too large to be one.
    """
    with directory.reading(MANIFEST_NAME) as (descriptor, size):
        if size > _LARGEST_BYTES:
            raise damaged(directory.path / MANIFEST_NAME, f"{size} bytes")
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
            size -= len(part)
            if size < 0:
                break  # It grows while it is read; the seal will not fit.
        return b"".join(parts)


def parse_manifest(data: bytes, path: Path) -> SavedSession:
    """What a manifest says.

    Args:
        data: Content of the file.
        path: For messages.

    Raises:
        StoreError: It was written by a newer version, or is damaged or made up.
    """
    beginning = _BEGINNING.match(data)
    if beginning is None:
        raise damaged(path, "no manifest of a saved session")
    _check_version(int(beginning[1]), path)
    # Nothing is parsed before it is known to be what was written.
    content = data[len(_sealed("")) - len(_AFTER) : -len(_AFTER)].decode("ascii", "replace")
    if _sealed(content) != data:
        raise damaged(path, "content that is not what was written")
    _check_amount(content, path)
    try:
        strict_json.parse(content)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    return _content(content, path)


def _check_amount(content: str, path: Path) -> None:
    found = sum(content.count(mark) for mark in "[{:")
    if found > _MOST_MARKS:
        raise damaged(path, f"{found} lists, mappings and keys, of at most {_MOST_MARKS}")


def _content(content: str, path: Path) -> SavedSession:
    try:
        return SavedSession.model_validate_json(content)
    except ValidationError as error:
        if error.error_count() > _MOST_DESCRIBED:
            raise damaged(path, f"{error.error_count()} values that cannot be") from error
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f"{place or 'the whole'}: {first['msg']}") from error


def damaged(path: Path, got: str) -> StoreError:
    """The error for a file that is not what was written."""
    return StoreError(
        explain(
            f"read the saved session in {path}",
            got=got,
            allowed="files as they were written",
            remedy="the session cannot be loaded from here; use another copy of the directory",
        )
    )


def _check_version(version: int, path: Path) -> None:
    if version < 1:
        raise damaged(path, f"format_version {version}")
    if version > FORMAT_VERSION:
        raise StoreError(
            explain(
                f"read the saved session in {path}",
                got=f"format version {version}, written by a newer sfi-agent",
                allowed=f"format versions up to {FORMAT_VERSION}",
                remedy="update sfi-agent to load it",
            )
        )


def _sealed(content: str) -> bytes:
    text = content.encode("ascii", "replace")
    digest = hashlib.sha256(text).hexdigest()
    head = strict_json.compact({"format": _FORMAT, "format_version": FORMAT_VERSION})
    start = f'{head[:-1]},"sha256":"{digest}","session":'.encode("ascii")
    return b"".join((start, text, _AFTER))
