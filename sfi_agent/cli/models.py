"""Loads the models that commands name: a directory, a Hub id, or the embedded one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sfi_agent.embedded import checkpoint_path

if TYPE_CHECKING:
    from sfi_agent.session.engine import Engine

__all__ = ["EMBEDDED", "load_engine"]

EMBEDDED = "embedded"
"""What users write for the model that is shipped in the package."""


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
    if not Path(source).is_dir():
        # Something may have to be downloaded, and that must be seen.
        return Engine.from_pretrained(source, device=device, dtype=dtype)
    with _without_progress_bars():
        return Engine.from_pretrained(source, device=device, dtype=dtype)


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
