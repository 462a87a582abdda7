"""A folder with a checkpoint in the embedded model's format: the shipped one, or a stand-in.

The stand-in has the same tokenizer, template and architecture, random weights and a fraction of the
size: it shows that programs run, and nothing of what they say.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from sfi_agent import CheckpointError
from sfi_agent.embedded import checkpoint_path

__all__ = ["shipped_or_stand_in", "trained_weights", "write_stand_in"]


def trained_weights() -> Path | None:
    """The folder of the shipped checkpoint; None where this tree has none."""
    try:
        return checkpoint_path()
    except CheckpointError:
        return None


def write_stand_in(folder: Path) -> Path:
    """Write a checkpoint with random weights, equal in every run, and return its folder."""
    from transformers.utils import logging

    from sfi_agent.embedded.export import export_network
    from sfi_agent.embedded.network import build_network

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        network = build_network(len(_tokenizer()), 7, **sizes, **heads)
        export_network(network.eval(), _tokenizer(), folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    return folder


def shipped_or_stand_in(folder: Path) -> Path:
    """The shipped checkpoint where there is one; else a stand-in, written into the folder."""
    return trained_weights() or write_stand_in(folder)


@lru_cache
def _tokenizer() -> Any:
    from sfi_agent.embedded.tokenizer_build import build_tokenizer

    return build_tokenizer()
