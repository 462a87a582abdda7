"""Tiny random causal models of many families, built in process, float32 and seeded.

Weights are drawn wide enough that attention is peaked and logits differ from token to token: with
the usual small initialisation attention is flat, and a test of sparse against dense attention
would pass whatever the engine does (`tests/test_engine/test_families.py` holds them to this).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from sfi_agent import Engine

__all__ = [
    "CONTEXT_TOKENS",
    "FAMILIES",
    "FULL_ATTENTION",
    "SLIDING_WINDOW_TOKENS",
    "VOCABULARY",
    "Family",
    "build_model",
    "model_of",
    "tiny_engine",
    "word_tokenizer",
]

VOCABULARY = 101
CONTEXT_TOKENS = 512
SLIDING_WINDOW_TOKENS = 7
"""Smaller than nearly every prompt of the tests, so that the band is always at work."""

_WEIGHT_DEVIATION = 0.35


@dataclass(frozen=True)
class Family:
    """A model class of transformers and the configuration that makes it tiny.

    Attributes:
        name: How tests call it.
        architecture: Class name prefix, such as "Llama" (LlamaConfig, LlamaForCausalLM).
        options: Keywords of the configuration, over `_COMMON`.
        configuration: Class name of the configuration where the prefix does not give it.
        sparse_layers: Those with full attention, where fast steps differ from dense ones.
    """

    name: str
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    configuration: str = ""
    sparse_layers: tuple[int, ...] = (0, 1)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": _WEIGHT_DEVIATION,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}

FAMILIES: tuple[Family, ...] = (
    Family("llama", "Llama", {"num_hidden_layers": 3}, sparse_layers=(0, 1, 2)),
    Family("llama_multi_head", "Llama", {"num_key_value_heads": 4, "head_dim": 8}),
    Family("llama_multi_query", "Llama", {"num_key_value_heads": 1, "head_dim": 128}),
    Family("qwen2", "Qwen2", {"head_dim": 12}),
    Family("qwen3", "Qwen3", {"head_dim": 64, "num_hidden_layers": 4}, sparse_layers=(0, 1, 2, 3)),
    Family(
        "mistral_sliding", "Mistral", {"sliding_window": SLIDING_WINDOW_TOKENS}, sparse_layers=()
    ),
    Family("mistral", "Mistral", {"sliding_window": None}),
    Family("gemma", "Gemma", {"head_dim": 96}),
    Family(
        "gemma3",
        "Gemma3",
        {
            "head_dim": 64,
            "num_hidden_layers": 4,
            "sliding_window": SLIDING_WINDOW_TOKENS,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 32,
        },
        configuration="Gemma3TextConfig",
        sparse_layers=(1, 3),
    ),
    Family(
        "gemma2",
        "Gemma2",
        {
            "head_dim": 32,
            "attn_logit_softcapping": 2.0,
            "attn_implementation": "eager",
            "sliding_window": SLIDING_WINDOW_TOKENS,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
        sparse_layers=(0,),
    ),
    Family(
        "gpt_oss",
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": SLIDING_WINDOW_TOKENS,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        sparse_layers=(1,),
    ),
    Family("phi3", "Phi3", {"head_dim": 12, "pad_token_id": 0, "sliding_window": None}),
    Family("qwen3_moe", "Qwen3Moe", {**_EXPERTS, "num_experts": 4, "head_dim": 32}),
    Family("olmo", "Olmo", {"num_key_value_heads": 4, "head_dim": 12}),
    Family("olmo2", "Olmo2", {"head_dim": 12}),
    Family(
        "olmo3",
        "Olmo3",
        {
            "head_dim": 12,
            "sliding_window": SLIDING_WINDOW_TOKENS,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        sparse_layers=(1,),
    ),
    Family("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
)

FULL_ATTENTION: tuple[Family, ...] = tuple(family for family in FAMILIES if family.sparse_layers)


def build_model(
    family: Family,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Any:
    """A fresh model of a family; equal seeds give equal weights on every device."""
    import transformers

    config_name = family.configuration or f"{family.architecture}Config"
    config = getattr(transformers, config_name)(**{**_COMMON, **family.options, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family.architecture}ForCausalLM")(config)
        # The row of the pad token is made zero, so all its keys would be equal.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=_WEIGHT_DEVIATION)
    return model.to(device=device, dtype=dtype).eval()


@lru_cache
def model_of(name: str) -> Any:
    """The shared float32 CPU model of a family; tests leave it as they found it."""
    return build_model(next(family for family in FAMILIES if family.name == name))


@lru_cache
def _chunked_engine(name: str, prefill_chunk_tokens: int | None) -> Engine:
    return Engine(model_of(name), word_tokenizer(), prefill_chunk_tokens=prefill_chunk_tokens)


def tiny_engine(name: str, prefill_chunk_tokens: int | None = None) -> Engine:
    """The shared engine of a family on the CPU, with a tokenizer of its vocabulary."""
    return _chunked_engine(name, prefill_chunk_tokens)


_MARKS = (".", ",", "!", "?", "\n\n", "<tool_call>", "</tool_call>", "```", "3", "-")


@lru_cache
def word_tokenizer() -> Any:
    """One word or mark per id: text detectors find sentences in what the tiny models write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f" word{index}" for index in range(VOCABULARY - 2 * len(_MARKS))]
    # Marks appear twice (with and without a leading space), so that they are met often.
    pieces = [*words, *_MARKS, *(f" {mark}" for mark in _MARKS)]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, " word0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
