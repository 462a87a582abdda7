"""What the engine must know about a model, and whether it can decode it at all.

Found once per model: layer kinds from the configuration, then a self-check that runs a few tokens
through the model's own attention and through ours. A model that our attention would compute
differently is refused with the reason instead of decoded wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.errors import UnsupportedModelError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelShape", "inspect_model"]

_KNOWN_LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The parts of a model's configuration that decoding depends on.

    Attributes:
        windows: Per attention layer its sliding window in tokens, None for full attention.
        context_limit_tokens: Longest sequence the positions were made for.
        vocabulary_size: Width of the logits.
        device: Where the whole model lives.
        dtype: Of weights, keys and values.
    """

    windows: tuple[int | None, ...]
    context_limit_tokens: int
    vocabulary_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def num_layers(self) -> int:
        return len(self.windows)


def inspect_model(model: PreTrainedModel) -> ModelShape:
    """Read the shape of a causal language model.

    Raises:
        UnsupportedModelError: Layer kind, attention sinks, rotary scaling or placement
            that cannot be handled, by name.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    _refuse_attention_interface(model, name)
    _refuse_features(config, name)
    parameters = list(model.parameters())
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1 or any(device.type == "meta" for device in devices):
        raise UnsupportedModelError(
            explain(
                f"tried to decode {name}",
                got=f"weights on {sorted(str(device) for device in devices)}",
                allowed="all weights on one CPU or one CUDA device",
                remedy="load it without device_map or with device='cuda:0'",
            )
        )
    return ModelShape(
        windows=_windows(config, name),
        context_limit_tokens=_context_limit(config),
        vocabulary_size=int(config.vocab_size),
        device=parameters[0].device,
        dtype=model.dtype,
    )


def _refuse_attention_interface(model: PreTrainedModel, name: str) -> None:
    from transformers import PreTrainedModel

    can_switch = getattr(type(model), "_can_set_attn_implementation", None)
    if can_switch is None or not can_switch():
        wrapped = not isinstance(model, PreTrainedModel)
        raise UnsupportedModelError(
            explain(
                f"tried to decode {name}",
                got="a model that does not use transformers' attention interface",
                allowed="models whose attention is looked up in ALL_ATTENTION_FUNCTIONS",
                remedy="give the model inside: get_base_model() of PEFT has its adapters in place, "
                "and what torch.compile wrapped is _orig_mod"
                if wrapped
                else "docs/supported_models.md lists families that work",
            )
        )


def _refuse_features(config: Any, name: str) -> None:
    reasons = []
    if getattr(config, "num_kv_shared_layers", 0):
        reasons.append("layers that share keys and values (num_kv_shared_layers)")
    if getattr(config, "use_bidirectional_attention", None):
        reasons.append("bidirectional attention")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("encoder-decoder attention")
    for scaling in _rotary_scalings(config):
        if scaling.get("rope_type") == "dynamic":
            # Its frequencies depend on the length, so cached keys would disagree with new ones.
            reasons.append("rotary scaling 'dynamic'")
    if reasons:
        raise UnsupportedModelError(
            explain(
                f"tried to decode {name}",
                got=", ".join(reasons),
                allowed="causal softmax attention with fixed rotary frequencies",
                remedy="docs/supported_models.md lists families that work",
            )
        )


def _windows(config: Any, name: str) -> tuple[int | None, ...]:
    """Mistral has a window and no layer_types; families with layer_types name each layer."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention" if window is None else "sliding_attention"
        kinds = [kind] * int(config.num_hidden_layers)
    windows: list[int | None] = []
    for index, kind in enumerate(kinds):
        if kind not in _KNOWN_LAYER_KINDS:
            raise UnsupportedModelError(
                explain(
                    f"tried to decode {name}",
                    got=f"layer {index} of kind {kind!r}",
                    allowed=", ".join(_KNOWN_LAYER_KINDS),
                    remedy="linear, recurrent and chunked layers are not supported yet",
                )
            )
        windows.append(int(window) if kind == "sliding_attention" and window else None)
    return tuple(windows)


def _rotary_scalings(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters, one dictionary per layer kind where a family has several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _context_limit(config: Any) -> int:
    """`max_position_embeddings`, or where "longrope" would switch its frequencies midway."""
    limit = int(getattr(config, "max_position_embeddings", 0) or 2**31 - 1)
    for scaling in _rotary_scalings(config):
        if scaling.get("rope_type") == "longrope":
            original = scaling.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, int(original or limit))
    return limit
