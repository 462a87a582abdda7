"""The linear layers of a decoding step: which weights are read together, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LinearLayer", "LinearSizes"]


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """Weights that share an input, so that one launch reads them all.

    Attributes:
        width: Input size.
        outputs: Output size of each weight.
        gated: Whether the weights are gate and up, whose result is `silu(gate) * up`.
    """

    width: int
    outputs: tuple[int, ...]
    gated: bool = False

    @property
    def weight_elements(self) -> int:
        return self.width * sum(self.outputs)

    @property
    def row_elements(self) -> int:
        """What one row has to read and write besides the weights."""
        return self.width + (self.outputs[0] if self.gated else sum(self.outputs))


@dataclass(frozen=True, slots=True)
class LinearSizes:
    """What the sizes of the attention do not say about a model's linear layers.

    Attributes:
        hidden_size: Of the states between layers, elements.
        intermediate_size: Of gate and up, elements.
        vocabulary_tokens: Outputs of the head.
    """

    hidden_size: int = 2560
    intermediate_size: int = 9728
    vocabulary_tokens: int = 151936

    def layers(self, query_elements: int, kv_elements: int) -> dict[str, LinearLayer]:
        """By name: qkv, out, gated, down and head.

        Args:
            query_elements: Of one row's queries, all heads.
            kv_elements: Of one row's keys, all heads; as many as of its values.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "qkv": LinearLayer(hidden, (query_elements, kv_elements, kv_elements)),
            "out": LinearLayer(query_elements, (hidden,)),
            "gated": LinearLayer(hidden, (inner, inner), gated=True),
            "down": LinearLayer(inner, (hidden,)),
            "head": LinearLayer(hidden, (self.vocabulary_tokens,)),
        }
