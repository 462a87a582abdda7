"""Windows of real text: a file of the user's, or the source of the Python standard library."""

from __future__ import annotations

import platform
import random
import sysconfig
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.fidelity.windows import Window, WindowReader, WindowSizes, tokenizer_of

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["file_windows", "standard_library_name", "standard_library_windows"]

_SMALLEST_FILE_BYTES = 4096
_BYTES_PER_TOKEN = 4
_LINE_CHARACTERS = 400
"""A window begins at the start of a line if one is this near."""


def standard_library_name() -> str:
    """What reports call the standard library; its text differs from version to version."""
    return f"standard library of Python {platform.python_version()}"


def file_windows(engine: Engine, path: Path, sizes: WindowSizes) -> list[Window]:
    """Windows of a text file, spread evenly from its start to its end; they may overlap.

    Args:
        engine: Its tokenizer is used.
        path: A file in UTF-8, of any length.
        sizes: How many windows of what size.

    Raises:
        InputError: The file cannot be read, is no text, is empty, or is too short for the
            windows; or the engine has no tokenizer.
    """
    reader = WindowReader(tokenizer_of(engine), sizes)
    text = _read_text(path)
    last = reader.last_start(text)
    if last is None:
        raise _too_short(path, f"{reader.count(text):,} tokens", reader)
    if sizes.samples > last + 1:
        raise _too_short(path, f"room for {last + 1:,} different windows", reader)
    steps = max(1, sizes.samples - 1)
    starts = [_line_start(text, last * index // steps) for index in range(sizes.samples)]
    if len(set(starts)) < sizes.samples:
        raise _too_short(path, f"room for {len(set(starts))} different windows", reader)
    windows = []
    for start in starts:
        window = reader.window(text, start, f"{path.name}, character {start:,}")
        if window is None:
            raise _too_short(path, f"{reader.count(text):,} tokens", reader)
        windows.append(window)
    return windows


def standard_library_windows(engine: Engine, sizes: WindowSizes, *, seed: int = 0) -> list[Window]:
    """Windows of modules of the Python standard library that runs this program.

    Modules are shuffled by the seed, those long enough for a window alone before the others; a
    window begins at the start of a module and goes on in the next one where a module ends early.

    Args:
        engine: Its tokenizer is used.
        sizes: How many windows of what size.
        seed: Which modules.

    Raises:
        InputError: The installation has no sources, or the engine has no tokenizer.
    """
    reader = WindowReader(tokenizer_of(engine), sizes)
    modules = cycle(_modules(sizes, seed))
    return [_module_window(reader, modules) for _ in range(sizes.samples)]


def _module_window(reader: WindowReader, modules: Iterator[Path]) -> Window:
    text, names = "", []
    while True:
        path = next(modules)
        names.append(path.name)
        text += f"# {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n"
        window = reader.window(text, 0, ", ".join(names))
        if window is not None:
            return window


def _modules(sizes: WindowSizes, seed: int) -> list[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    large = {path: path.stat().st_size for path in found}
    kept = [path for path in found if large[path] >= _SMALLEST_FILE_BYTES]
    if not kept:
        raise InputError(
            explain(
                "took text from the Python standard library",
                got=f"an installation without its sources ({folder.name} holds no .py files)",
                remedy="give a text file instead",
            )
        )
    random.Random(f"standard library:{seed}").shuffle(kept)
    enough = sizes.tokens * _BYTES_PER_TOKEN
    # sorted() is stable: within both groups the shuffled order stays.
    return sorted(kept, key=lambda path: large[path] < enough)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            explain(
                f"read text from {str(path)!r}",
                got=f"bytes that are not UTF-8 at {error.start:,}",
                allowed="a text file in UTF-8",
                remedy="convert it to UTF-8",
            )
        ) from error
    except OSError as error:
        raise InputError(
            explain(f"read text from {str(path)!r}", got=str(error), allowed="a readable file")
        ) from error
    if "\0" in text:
        raise InputError(
            explain(
                f"read text from {str(path)!r}",
                got="a file with zero bytes",
                allowed="a text file in UTF-8",
            )
        )
    if not text.strip():
        raise InputError(
            explain(f"read text from {str(path)!r}", got="an empty file", allowed="some text")
        )
    return text


def _line_start(text: str, start: int) -> int:
    """The start of the line that `start` lies in, unless that is far away."""
    found = text.rfind("\n", max(0, start - _LINE_CHARACTERS), start)
    return start if found < 0 else found + 1


def _too_short(path: Path, got: str, reader: WindowReader) -> InputError:
    sizes = reader.sizes
    return InputError(
        explain(
            f"cut {str(path)!r} into windows",
            got=got,
            allowed=f"at least {reader.needed_tokens:,} tokens ({sizes.prompt_tokens:,} of prompt "
            f"and {sizes.continuation_tokens:,} of continuation) and {sizes.samples} different "
            "places to start from",
            remedy="give a longer text, or ask for shorter prompts or fewer samples",
        )
    )
