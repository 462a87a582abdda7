"""Reads the sources of this checkout for the tests that guard its layout."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PACKAGES", "ROOT", "Import", "imports", "modules"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "sfi_agent": ROOT / "sfi_agent",
    "sfi_policies": ROOT / "policies" / "sfi_policies",
    "sfi_selectors": ROOT / "selectors" / "sfi_selectors",
}


@dataclass(frozen=True)
class Import:
    """One imported module with the names taken from it.

    Attributes:
        line: Line of the statement.
        module: Dotted name of the module, absolute.
        names: Names after `from module import`; empty for `import module`.
    """

    line: int
    module: str
    names: tuple[str, ...]


def modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file below a folder with its syntax tree."""
    for path in sorted(folder.rglob("*.py")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import of a module, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield Import(node.lineno, module, tuple(alias.name for alias in node.names))
