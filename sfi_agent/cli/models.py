"""Loads the models that commands name: a directory, a Hub id, or the embedded one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.embedded import checkpoint_path

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["EMBEDDED", "EMBEDDED_THREADS", "cpu_threads", "is_local", "load_engine"]

EMBEDDED = "embedded"
"""What users write for the model that is shipped in the package."""
EMBEDDED_THREADS = 1


def load_engine(model: str, *, device: str, dtype: str) -> Engine:
    """The engine of a checkpoint.

    Args:
        model: Directory, Hub id, or "embedded". The embedded model with dtype "auto" runs in
            float32: it is small, and CPUs are at their best there.
        device: As in `Engine.from_pretrained`.
        dtype: As in `Engine.from_pretrained`.

    Raises:
        CheckpointError: Nothing loadable is there.
        ConfigError: Device or dtype is unknown or not available.
        UnsupportedModelError: The model cannot be decoded slow-fast, with the reason.
    """
    from sfi_agent.session.engine import Engine

    source: str | Path = model
    if model == EMBEDDED:
        source = checkpoint_path()
        dtype = "float32" if dtype == "auto" else dtype
    if not is_local(model):
        return Engine.from_pretrained(source, device=device, dtype=dtype)
    with _without_progress_bars():
        return Engine.from_pretrained(source, device=device, dtype=dtype)


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Let torch compute on so many threads while the block runs; None changes nothing.

    The embedded model is so small that a second thread mostly waits for the first, and on busy
    cores makes every step several times slower: `EMBEDDED_THREADS`.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_local(model: str) -> bool:
    """Whether loading is quick and silent; a download shows its own progress."""
    return model == EMBEDDED or Path(model).is_dir()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
