"""Random-weight models of published shapes, for measurements that depend on sizes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.errors import ConfigError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MODEL_SHAPES", "build_random_model", "outline_model"]

# Sizes as published in the checkpoints' config.json files.
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


def build_random_model(
    shape: str, *, device: torch.device, dtype: torch.dtype, context_tokens: int, seed: int = 0
) -> PreTrainedModel:
    """A model of a named shape with small random weights, in eval mode.

    Args:
        shape: One of `MODEL_SHAPES`.
        device: Where to build it; nothing is built elsewhere first.
        dtype: Of the weights.
        context_tokens: Longest sequence it must take.
        seed: Of the weights.

    Raises:
        ConfigError: The shape is unknown.
    """
    model = _made(shape, device, dtype, context_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    model.eval()
    return model


def outline_model(shape: str, *, dtype: torch.dtype, context_tokens: int) -> PreTrainedModel:
    """The same model without numbers, on the meta device: its sizes, for nothing.

    Raises:
        ConfigError: The shape is unknown.
    """
    return _made(shape, torch.device("meta"), dtype, context_tokens)


def _made(
    shape: str, device: torch.device, dtype: torch.dtype, context_tokens: int
) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if shape not in MODEL_SHAPES:
        raise ConfigError(
            explain("asked for a model shape", got=repr(shape), allowed=", ".join(MODEL_SHAPES))
        )
    sizes = dict(MODEL_SHAPES[shape], max_position_embeddings=context_tokens)
    config = AutoConfig.for_model(**sizes)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(previous)
    return model
