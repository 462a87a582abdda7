"""Bytes of a model and of its keys and values, from a model that may hold no numbers at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelSizes"]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What bytes are counted from.

    Attributes:
        layers: Attention layers.
        query_heads: Query heads of a layer.
        kv_heads: KV heads of a layer.
        head_size: Of keys and values, elements.
        vocabulary_size: Width of the logits.
        dtype: Of weights, keys and values.
        weight_bytes: All parameters, tied ones once.
        lookup_bytes: An embedding table that is only looked up; 0 where it is the head too.
        row_bytes: One row of that table.
        expert_bytes: All experts of all layers; 0 without.
        experts: Experts of a layer.
        active_experts: How many of them a token takes.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    dtype: torch.dtype
    weight_bytes: int
    lookup_bytes: int = 0
    row_bytes: int = 0
    expert_bytes: int = 0
    experts: int = 1
    active_experts: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSizes:
        """Read them; the model may be on the meta device."""
        config = model.config.get_text_config()
        heads = int(config.num_attention_heads)
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        assert isinstance(table, torch.Tensor)
        looked_up = head is not None and head.weight is not table
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        return cls(
            layers=int(config.num_hidden_layers),
            query_heads=heads,
            kv_heads=int(config.num_key_value_heads),
            head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocabulary_size=int(config.vocab_size),
            dtype=model.dtype,
            weight_bytes=sum(item.nbytes for item in model.parameters()),
            lookup_bytes=table.nbytes if looked_up else 0,
            row_bytes=table[0].nbytes,
            expert_bytes=sum(item.nbytes for item in experts),
            experts=int(getattr(config, "num_experts", None) or 1),
            active_experts=int(getattr(config, "num_experts_per_tok", None) or 1),
        )

    @property
    def token_bytes(self) -> int:
        """Key and value of one token, all layers and KV heads."""
        return self.layers * self.layer_token_bytes

    @property
    def layer_token_bytes(self) -> int:
        """Key and value of one token in one layer."""
        return 2 * self.kv_heads * self.head_size * self.dtype.itemsize

    def read_weight_bytes(self, rows: int) -> int:
        """Weights that a step over `rows` tokens reads once.

        Of experts those that are expected to be chosen by at least one token, if every token
        chooses at random: a router of random weights does about that.
        """
        missed = (1.0 - self.active_experts / self.experts) ** rows
        unread_experts = self.expert_bytes * missed if self.expert_bytes else 0.0
        looked_up = rows * self.row_bytes if self.lookup_bytes else 0
        return round(self.weight_bytes - self.lookup_bytes - unread_experts) + looked_up
