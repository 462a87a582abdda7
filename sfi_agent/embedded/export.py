"""Writes a trained network as the folder that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.embedded.chat_format import END_OF_TEXT, MESSAGE_CLOSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["export_network"]


def export_network(
    network: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write the network in bfloat16 shards of at most 12 MB, with tokenizer and defaults."""
    from transformers import GenerationConfig

    copy: Any = type(network)(network.config)
    copy.load_state_dict(network.state_dict())
    copy = copy.to(torch.bfloat16)
    vocabulary = tokenizer.get_vocab()
    end_of_turn, padding = vocabulary[MESSAGE_CLOSE], vocabulary[END_OF_TEXT]
    copy.config.eos_token_id, copy.config.pad_token_id = end_of_turn, padding
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end_of_turn, padding], pad_token_id=padding
    )
    copy.save_pretrained(folder, max_shard_size="12MB")
    tokenizer.save_pretrained(folder)
