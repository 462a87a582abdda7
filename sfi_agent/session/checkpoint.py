"""Loading a checkpoint: weights and tokenizer, with every way it can fail told apart by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfi_agent.errors import CheckpointError, ConfigError, explain
from sfi_agent.observe.log import log_event

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["find_device", "find_dtype", "load_model", "load_tokenizer"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICE_TYPES = ("cpu", "cuda")
_SHOWN_NAMES = 4
_TOKENIZER_FILES = frozenset(
    {"vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"}
)
"""Besides everything whose name begins with "tokenizer"."""


def find_device(name: str) -> torch.device:
    """The device of a name: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: It is unknown, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name) if isinstance(name, str) else None
    except RuntimeError:
        device = None
    if device is None or device.type not in _DEVICE_TYPES:
        raise ConfigError(
            explain("asked for a device", got=repr(name), allowed="auto, cpu, cuda, cuda:N")
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            explain(
                f"asked for the device {name!r}",
                got=f"{torch.cuda.device_count()} CUDA devices on this machine",
                allowed="cpu, or the index of a device that is there",
            )
        )
    return device


def find_dtype(name: str) -> str | torch.dtype:
    """The number type of a name; "auto" stays as it is.

    Raises:
        ConfigError: It is unknown.
    """
    if name == "auto":
        return name
    if not isinstance(name, str) or name not in _DTYPES:
        allowed = ", ".join(["auto", *_DTYPES])
        raise ConfigError(explain("asked for a dtype", got=repr(name), allowed=allowed))
    return _DTYPES[name]


def load_model(path: str | Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """A causal language model with all of its weights, in eval mode, on the CPU.

    Raises:
        CheckpointError: Nothing loadable is there, or some of the weights are missing.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except Exception as error:
        # Readers of damaged files raise whatever they come upon, types of their own included.
        got = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise CheckpointError(
            explain(
                f"tried to load a model from {str(path)!r}",
                got="no such directory" if _is_missing_directory(path) else got,
                allowed="a directory with config.json and weights, or a Hub id",
            )
        ) from error
    # transformers would fill them with random numbers and say so in a warning.
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - _SHOWN_NAMES} more" if len(missing) > _SHOWN_NAMES else ""
        raise CheckpointError(
            explain(
                f"tried to load {type(model).__name__} from {str(path)!r}",
                got=f"no weights for {', '.join(missing[:_SHOWN_NAMES])}{more}",
                allowed="a checkpoint of a causal language model with all of its weights",
            )
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _is_missing_directory(path: str | Path) -> bool:
    """Whether a path was meant that is not there: a Hub id has one slash, and none in front."""
    text = str(path)
    is_path = isinstance(path, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1
    return is_path and not Path(path).exists()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None, with a log event, where it has none.

    Ids can be decoded without one; whatever needs text raises by name.

    Raises:
        CheckpointError: A directory holds a tokenizer that cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    files = [item.name for item in folder.iterdir()] if folder.is_dir() else None
    cause = "no tokenizer file"
    if files is None or any(map(_belongs_to_tokenizer, files)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            if files is not None:
                raise CheckpointError(
                    explain(
                        f"tried to load the tokenizer of {str(path)!r}",
                        got=cause,
                        remedy="repair its files, or load model and tokenizer yourself and make "
                        "an Engine(model, tokenizer)",
                    )
                ) from error
        else:
            if _has_vocabulary(tokenizer):
                return tokenizer
            cause = "a tokenizer without a vocabulary"
    log_event("warning", "tokenizer_missing", path=str(path), cause=cause)
    return None


def _belongs_to_tokenizer(file_name: str) -> bool:
    return file_name.startswith("tokenizer") or file_name in _TOKENIZER_FILES


def _has_vocabulary(tokenizer: Any) -> bool:
    # For some model types transformers makes a tokenizer of control tokens out of nothing.
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return bool(set(tokenizer.get_vocab()) - added)
