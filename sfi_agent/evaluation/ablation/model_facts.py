"""What a results folder remembers of the model, the tokenizer and the versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sfi_agent.plugins import load_plugins

if TYPE_CHECKING:
    from sfi_agent.config import SessionConfig
    from sfi_agent.session.engine import Engine

__all__ = ["model_facts", "plugin_origins", "versions"]

_SAMPLED_NUMBERS = 1024
_PACKAGES = {"sfi_agent": "sfi-agent", "torch": "torch", "transformers": "transformers"}


def model_facts(engine: Engine, name: str) -> dict[str, Any]:
    """Name, shape and digests of a model, as plain data.

    Digests tell checkpoints apart wherever they lie: of the weights, up to 1024 numbers of every
    tensor, evenly spread; of the tokenizer, vocabulary and chat template.
    """
    config: Any = engine.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    return {
        "name": name,
        "class": type(engine.model).__name__,
        "layers": engine.shape.num_layers,
        "query_heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "parameters": sum(tensor.numel() for tensor in engine.model.parameters()),
        "dtype": str(engine.shape.dtype).removeprefix("torch."),
        "device": engine.shape.device.type,
        "weights_digest": _weights_digest(engine),
        "tokenizer_digest": _tokenizer_digest(engine),
    }


def versions() -> dict[str, str]:
    """Versions of this package and of what computes the numbers."""
    found = {"sfi_agent": "not installed", "python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:  # Ours may run from a folder; the others are there.
            continue
    return found


def plugin_origins(configs: Iterable[SessionConfig]) -> dict[str, str]:
    """Distribution and version of every plugin that is used and not built in."""
    registry = load_plugins()
    found: dict[str, str] = {}
    for config in configs:
        entries = [(registry.detectors, entry.name) for entry in config.boundaries]
        for known, name in [*entries, (registry.selectors, config.selector.name)]:
            if known[name].owner.distribution:
                found[f"{known[name].kind} {name}"] = known[name].origin
    return dict(sorted(found.items()))


def _weights_digest(engine: Engine) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_NUMBERS)
        numbers = flat[::step][:_SAMPLED_NUMBERS].to("cpu").contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tokenizer_digest(engine: Engine) -> str | None:
    tokenizer: Any = engine.tokenizer
    if tokenizer is None:
        return None
    content = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
