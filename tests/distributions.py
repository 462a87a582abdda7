"""Throwaway installed distributions: a folder with a package and its metadata, put on sys.path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["installed", "write_distribution"]


def write_distribution(
    folder: Path, name: str, modules: dict[str, str], entry_points: dict[str, str], version: str
) -> None:
    """Write modules and the metadata that an installer would write.

    Args:
        folder: Where; becomes an entry of sys.path.
        name: Distribution name.
        modules: Source text by module name.
        entry_points: Entry-point values of the group `sfi_agent` by name.
        version: Version of the distribution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{point} = {value}" for point, value in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[sfi_agent]", *lines, ""]))


@contextmanager
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the folder on sys.path, and forget the modules it brought afterwards."""
    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            yield
        finally:
            for module in set(sys.modules) - before:
                file = getattr(sys.modules[module], "__file__", None)
                if file and Path(file).is_relative_to(folder):
                    del sys.modules[module]
