"""What a saved session needs to find again: the model to the last bit, the tokenizer, the template.

Digests are kept per object and made anew when it has changed. A change that torch does not count
(through `parameter.data`) is seen in the few numbers of each tensor that are looked at every time:
that of a whole tensor, as when an adapter is merged, and not that of a single number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sfi_agent.session.store import strict_json
from sfi_agent.session.store.digests import as_bytes, digest_of, host_bytes
from sfi_agent.session.store.manifest import SavedModel
from sfi_agent.session.store.shard_form import name_of_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TokenizerPrint", "fingerprint_model", "fingerprint_tokenizer"]

_NO_MATTER = frozenset(
    {
        "architectures",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Of a configuration: says where it comes from or what is given out, not what is computed."""

_SAMPLED_NUMBERS = 64


@dataclass(frozen=True, slots=True)
class TokenizerPrint:
    """Digests of a tokenizer.

    Attributes:
        tokenizer: Of its vocabulary, rules and special tokens; None without a tokenizer.
        chat_template: Of its chat template and response template; None without either.
    """

    tokenizer: str | None
    chat_template: str | None


_models: WeakKeyDictionary[PreTrainedModel, tuple[object, str]] = WeakKeyDictionary()
_tokenizers: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, str]] = WeakKeyDictionary()


def fingerprint_model(model: PreTrainedModel) -> SavedModel:
    """Class, configuration and weights of a model; reads all of its parameters, once."""
    return SavedModel(
        class_name=type(model).__name__,
        config=_sha256(strict_json.canonical(_plain(_computing(model.config.to_dict())))),
        weights=_weights_digest(model),
        dtype=name_of_dtype(model.dtype),  # type: ignore[arg-type]
    )


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> TokenizerPrint:
    """Vocabulary and templates of a tokenizer."""
    if tokenizer is None:
        return TokenizerPrint(None, None)
    templates = [getattr(tokenizer, name, None) for name in ("chat_template", "response_template")]
    written = strict_json.canonical(_plain(templates)) if any(templates) else None
    return TokenizerPrint(
        _tokenizer_digest(tokenizer), None if written is None else _sha256(written)
    )


def _weights_digest(model: PreTrainedModel) -> str:
    tensors = [
        (name, tensor)
        for name, tensor in sorted(model.state_dict(keep_vars=True).items())
        if isinstance(tensor, Tensor)
    ]
    state = _versions(tensors)
    known = _models.get(model)
    if known is not None and state is not None and known[0] == state:
        return known[1]
    found, seen = hashlib.sha256(), dict[object, bytes]()
    with torch.no_grad():
        for name, tensor in tensors:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if place not in seen:
                # Tied weights are read once.
                seen[place] = digest_of(as_bytes(tensor))
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(seen[place])
    _models[model] = (state, found.hexdigest())
    return found.hexdigest()


def _versions(tensors: list[tuple[str, Tensor]]) -> object:
    """Changes when a tensor is replaced or written to; None where torch does not count writes."""
    if any(tensor.is_inference() for _, tensor in tensors):
        return None
    counted = tuple(
        (name, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype)
        for name, tensor in tensors
    )
    return counted, _samples([tensor for _, tensor in tensors])


def _samples(tensors: list[Tensor]) -> tuple[bytes, ...]:
    """Some numbers of every tensor, copied to the host once per device."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_contiguous():
            flat = tensor.detach().view(-1)
            some = as_bytes(flat[:: max(1, flat.numel() // _SAMPLED_NUMBERS)])
            found.setdefault(tensor.device, []).append(some)
    return tuple(host_bytes(torch.cat(some)).tobytes() for some in found.values())


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    special = {
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "added": {
            str(index): [token.content, token.special, token.lstrip, token.rstrip, token.normalized]
            for index, token in tokenizer.added_tokens_decoder.items()
        },
        "size": len(tokenizer),
    }
    state = strict_json.canonical(_plain(special))
    known = _tokenizers.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = tokenizer.get_vocab()
    if backend is not None:
        rules = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):
            rules.pop(passing, None)
    digest = _sha256(f"{state}\n{strict_json.canonical(rules)}")
    _tokenizers[tokenizer] = (state, digest)
    return digest


def _computing(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a configuration, and of those inside it, that say what is computed."""
    return {
        key: _computing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NO_MATTER and not str(key).startswith("_")
    }


def _plain(value: Any) -> Any:
    """Something that JSON takes and that is the same in every process."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=repr)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
