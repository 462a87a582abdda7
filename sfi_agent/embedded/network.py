"""The embedded network and its training forward pass.

The network is transformers' Qwen3 with a small configuration. Training does not call its
`forward`: the same modules are run by the functions below, which also return the entropy of
sampled attention rows and compile layer by layer. A test holds both forwards equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen3ForCausalLM

__all__ = ["QK_NORM_INIT", "TrainingForward", "attention_entropy", "build_network"]

QK_NORM_INIT = 2.0
"""Start value of the query and key norm weights: attention logits start four times as wide as
with 1.0, and without it some kinds of question are not learned at all."""
ROPE_THETA = 100_000.0
MAX_POSITIONS = 16_384


def build_network(vocabulary_size: int, seed: int, **changes: Any) -> Qwen3ForCausalLM:
    """A freshly initialised network in float32, about 11 M parameters unless `changes` say else.

    Args:
        vocabulary_size: Number of tokens.
        seed: Seed of the initial weights.
        changes: Fields of `Qwen3Config` to replace, for small test networks.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    network = Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes}))
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.q_norm.weight.fill_(QK_NORM_INIT)
            layer.self_attn.k_norm.weight.fill_(QK_NORM_INIT)
    return network


def attention_entropy(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Mean entropy, in nats, of causal attention at the given query rows; lower is more peaked.

    Args:
        queries: `[batch, heads, tokens, head_dim]` after rotary embedding, unscaled.
        keys: `[batch, kv_heads, tokens, head_dim]` after rotary embedding.
        rows: `[batch, rows]` int64, query positions.
    """
    batch, heads, tokens, size = queries.shape
    kv_heads = keys.shape[1]
    index = rows[:, None, :, None].expand(batch, heads, rows.shape[1], size)
    chosen = queries.gather(2, index).reshape(batch, kv_heads, -1, size)
    logits = (chosen @ keys.transpose(2, 3)).float() * size**-0.5
    positions = torch.arange(tokens, device=rows.device)
    future = positions > rows[:, :, None]
    group = heads // kv_heads
    hidden = future[:, None].repeat(1, 1, group, 1)
    logits = logits.masked_fill(hidden, -1e9)
    log_share = logits.log_softmax(-1)
    entropies: Tensor = -(log_share.exp() * log_share).sum(-1)
    return entropies.mean()


def _layer(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    attention = layer.self_attn
    batch, tokens, _ = hidden.shape
    shape = (batch, tokens, -1, attention.head_dim)
    normed = layer.input_layernorm(hidden)
    queries = attention.q_norm(attention.q_proj(normed).view(shape)).transpose(1, 2)
    keys = attention.k_norm(attention.k_proj(normed).view(shape)).transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    if rows is None:
        return hidden, hidden.new_zeros((), dtype=torch.float32)
    return hidden, attention_entropy(queries, keys, rows)


def _head(network: Any, hidden: Tensor, ids: Tensor, answered: Tensor) -> tuple[Tensor, Tensor]:
    logits = network.lm_head(network.model.norm(hidden)).float()[:, :-1]
    targets = ids[:, 1:].masked_fill(~answered[:, 1:], -100)
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    # A batch in which no answer fits must give 0: a mean over nothing is NaN and would stay.
    loss = total / answered[:, 1:].sum().clamp(min=1)
    right = logits.detach().argmax(-1) == ids[:, 1:]
    return loss, right


class TrainingForward:
    """Loss of a batch of documents: next-token loss on answers, and attention entropy.

    Args:
        network: What is trained; its parameters are used in place.
        compiled: Compile layer and head with torch.compile, one graph per batch shape.
    """

    def __init__(self, network: Qwen3ForCausalLM, *, compiled: bool) -> None:
        self._network = network
        wrap: Callable[[Any], Any] = _compile if compiled else _identity
        self._layer = wrap(_layer)
        self._head = wrap(_head)

    def __call__(
        self, ids: Tensor, answered: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one batch.

        Args:
            ids: `[batch, tokens]` int64.
            answered: `[batch, tokens]` bool, tokens that the assistant writes.
            rows: `[batch, rows]` int64 query positions whose attention entropy is wanted.

        Returns:
            Mean cross-entropy over the answered tokens in nats; mean attention entropy in nats
            (0 without rows); `[batch, tokens - 1]` bool, whether the greedy choice for each
            next token was the one in `ids`.
        """
        model: Any = self._network.model
        hidden = model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = model.rotary_emb(hidden, positions)
        entropies = []
        for layer in model.layers:
            hidden, entropy = self._layer(layer, hidden, cos, sin, rows)
            entropies.append(entropy)
        loss, right = self._head(self._network, hidden, ids, answered)
        return loss, torch.stack(entropies).mean(), right


def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def _identity(function: Any) -> Any:
    return function
