"""The embedded network and its training forward pass.

The network is transformers' Qwen3 with a small configuration. Training does not call its
`forward`: the same weights are run by the functions below, which also say how much attention
chosen rows give to chosen positions, and compute logits only where an answer is learned. A test
holds both forwards equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sfi_agent.embedded.supervision import (
    SUPERVISION,
    attention_source_loss,
    rms_norm,
    telling_loss,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen3ForCausalLM

__all__ = ["QK_NORM_INIT", "ForwardResult", "build_network", "training_forward"]

QK_NORM_INIT = 2.0
"""Start value of the query and key norm weights: attention logits start four times as wide as
with 1.0, wide enough to single out one position among thousands."""
ROPE_THETA = 1e9
"""High, so that half of the rotary pairs turn by less than a radian over 8,192 positions and can
match names and fields at any distance."""
MAX_POSITIONS = 16_384
_WRITTEN_OUT_TOKENS = 1024
_EMBEDDING_GAIN = 4.0


def build_network(vocabulary_size: int, seed: int, **changes: Any) -> Qwen3ForCausalLM:
    """A freshly initialised network in float32, 4 layers of width 192 unless `changes` say else.

    Args:
        vocabulary_size: Number of tokens.
        seed: Seed of the initial weights.
        changes: Fields of `Qwen3Config` to replace, for small test networks.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    network = Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes}))
    with torch.no_grad():
        _initialise(network)
    return network


def _initialise(network: Any) -> None:
    """Start values that make copying and matching the first things the network does.

    Wide embeddings keep a token's identity visible next to what attention adds. In all but the
    first layer the output projection starts as the transpose of the value projection: what a
    head attends to is written out as it is. In the last layer queries start equal to keys: a row
    attends to what carries the same name.
    """
    layers = network.model.layers
    network.model.embed_tokens.weight.mul_(_EMBEDDING_GAIN)
    for layer in layers:
        layer.self_attn.q_norm.weight.fill_(QK_NORM_INIT)
        layer.self_attn.k_norm.weight.fill_(QK_NORM_INIT)
    size, group = network.config.head_dim, layers[0].self_attn.num_key_value_groups
    for layer in layers[1:]:
        values = layer.self_attn.v_proj.weight.unflatten(0, (-1, size))
        written = values.repeat_interleave(group, dim=0).flatten(0, 1)
        layer.self_attn.o_proj.weight.copy_(written.T)
    matching = layers[-1].self_attn
    keys = matching.k_proj.weight.unflatten(0, (-1, size))
    matching.q_proj.weight.copy_(keys.repeat_interleave(group, dim=0).flatten(0, 1))


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What a training pass returns.

    Attributes:
        loss: Mean cross-entropy over the answered tokens, in nats.
        sources: Role to `attention_source_loss`; "<role>_token" to the cross-entropy, in nats, of
            telling the target's token, for roles that must.
        right: `[answered tokens]` bool, whether the greedy choice was the token that stands
            there; in the order of documents, then positions.
    """

    loss: Tensor
    sources: dict[str, Tensor]
    right: Tensor


def training_forward(
    network: Qwen3ForCausalLM,
    ids: Tensor,
    answered: Tensor,
    positions: Tensor,
    sources: Mapping[str, tuple[Tensor, Tensor]],
) -> ForwardResult:
    """Run one batch.

    Args:
        network: What is trained; its parameters are used in place.
        ids: `[batch, tokens]` int64.
        answered: `[batch, tokens]` bool, tokens that the assistant writes.
        positions: `[batch, tokens]` int64, strictly increasing along a document.
        sources: Role of `SUPERVISION` to rows and targets, see `attention_source_loss`.
    """
    model: Any = network.model
    hidden = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(hidden, positions)
    lost: dict[str, Tensor] = {}
    for index, layer in enumerate(model.layers):
        queries, keys, values = _project(layer, hidden, cos[:, None], sin[:, None])
        for role, (rows, targets) in sources.items():
            duty = SUPERVISION[role]
            if duty.layer == index:
                lost[role] = attention_source_loss(
                    queries, keys, duty.heads, rows, targets, together=duty.together
                )
        mixed = _attend(queries, keys, values)
        for role, (rows, targets) in sources.items():
            if SUPERVISION[role].layer == index and SUPERVISION[role].tells:
                lost[f"{role}_token"] = telling_loss(
                    network, layer, mixed, SUPERVISION[role].heads, rows, targets, ids
                )
        hidden = _add(layer, hidden, mixed)
    before = F.pad(answered[:, 1:], (0, 1))
    chosen = rms_norm(hidden[before], model.norm)
    logits = network.lm_head(chosen).float()
    wanted = ids[:, 1:][answered[:, 1:]]
    # A batch in which no answer fits must give 0: a mean over nothing is NaN and would stay.
    loss = F.cross_entropy(logits, wanted, reduction="sum") / max(1, wanted.numel())
    return ForwardResult(loss, lost, logits.detach().argmax(-1) == wanted)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    swapped = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos + swapped * sin


def _project(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = layer.self_attn
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    normed = rms_norm(hidden, layer.input_layernorm)
    queries = attention.q_proj(normed).view(shape).transpose(1, 2).float()
    keys = attention.k_proj(normed).view(shape).transpose(1, 2).float()
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    queries = _turn(rms_norm(queries, attention.q_norm), cos, sin).to(values.dtype)
    keys = _turn(rms_norm(keys, attention.k_norm), cos, sin).to(values.dtype)
    return queries, keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention, `[batch, heads, tokens, head_dim]`.

    Written out for short documents on a CPU, where it takes a third of the time of the fused
    operator, whose tiles are made for long ones.
    """
    batch, heads, tokens, size = queries.shape
    if tokens > _WRITTEN_OUT_TOKENS or queries.is_cuda:
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
    kv_heads = keys.shape[1]
    folded = (queries * size**-0.5).reshape(batch, kv_heads, -1, size)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).repeat(heads // kv_heads, 1)
    scores = (folded @ keys.transpose(2, 3)).masked_fill_(future, -1e9)
    with torch.autocast("cpu", enabled=False):
        mixed: Tensor = scores.softmax(-1) @ values
    return mixed.reshape(batch, heads, tokens, size)


def _add(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    normed = rms_norm(hidden, layer.post_attention_layernorm)
    feed = layer.mlp
    inner = F.silu(feed.gate_proj(normed)) * feed.up_proj(normed)
    summed: Tensor = hidden + feed.down_proj(inner)
    return summed
