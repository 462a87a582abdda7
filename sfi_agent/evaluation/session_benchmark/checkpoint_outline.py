"""Sizes of a checkpoint, from its configuration alone: nothing is loaded, nothing allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.errors import CheckpointError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["outline_checkpoint"]


def outline_checkpoint(source: str | Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint without numbers, on the meta device.

    Args:
        source: Directory or Hub id.
        dtype: Of the weights; "auto" takes that of the configuration.

    Raises:
        CheckpointError: No configuration of a causal language model is there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    made: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(source)
        number_type = config.dtype if isinstance(dtype, str) else dtype
        with torch.device("meta"):
            model: PreTrainedModel = made.from_config(config, dtype=number_type or torch.float32)
    except Exception as error:
        # Readers of damaged files raise whatever they come upon, types of their own included.
        raise CheckpointError(
            explain(
                f"read the configuration of {str(source)!r}",
                got=f"{type(error).__name__}: {error}",
                allowed="a directory with config.json and weights, or a Hub id",
            )
        ) from error
    return model
