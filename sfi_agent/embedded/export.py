"""Writes a trained network as the folder that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfi_agent.embedded.chat_format import END_OF_TEXT, MESSAGE_CLOSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

__all__ = ["export_network"]


def export_network(
    network: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write the network in float32, with tokenizer and generation defaults.

    Float32 because the shipped network is small (under 10 MB) and a CPU runs its small matrix
    products as fast as in bfloat16, without rounding attention logits.
    """
    from transformers import GenerationConfig

    copy: Any = type(network)(network.config)
    copy.load_state_dict(network.state_dict())
    vocabulary = tokenizer.get_vocab()
    end_of_turn, padding = vocabulary[MESSAGE_CLOSE], vocabulary[END_OF_TEXT]
    copy.config.eos_token_id, copy.config.pad_token_id = end_of_turn, padding
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end_of_turn, padding], pad_token_id=padding
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
