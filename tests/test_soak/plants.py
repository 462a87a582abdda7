"""Tiny chat models for the soak test, each with a twin of equal weights that no session touches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sfi_agent import Engine, ParkingLimits
from tests import chat_templates
from tests.families import FAMILIES, build_model
from tests.test_session.helpers import FAMILIES as TEMPLATES
from tests.test_soak.memory import MemoryWatch
from tests.tiny_tokenizers import chatml_tokenizer

__all__ = ["CONTEXT_TOKENS", "PLANTS", "Plant", "Setting", "plant"]

CONTEXT_TOKENS = 1024
"""Small, so that conversations run into it."""
_ODD_END = "<|endoftext|>"
_PARKING_BYTES = 900_000
"""Two or three sessions hold so much."""


@dataclass(frozen=True)
class Setting:
    """What a run is played on.

    Attributes:
        family: Name in `tests.families`.
        template: Name in `tests.chat_templates`.
        prefill_chunk_tokens: See `Engine`.
        tools: Whether the template can show tools.
        appends: Whether messages can be appended to what is there, in this template.
        parks: Whether idle sessions are parked on disk by themselves.
    """

    family: str
    template: str = "CHATML"
    prefill_chunk_tokens: int | None = None
    tools: bool = True
    appends: bool = True
    parks: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}_{self.template.lower()}"


@dataclass(frozen=True, eq=False)
class Plant:
    """An engine, and its weights in a model of its own.

    Attributes:
        engine: Sessions are opened on it.
        twin: Computes what is expected, by transformers' own attention.
        setting: What it was made from.
        end: Text of the token that ends a turn in this template.
        odd_end: Text of another token that ends a turn, which the template does not write.
        memory: Watches the buffers of its sessions.
    """

    engine: Engine
    twin: Any
    setting: Setting
    end: str
    odd_end: str = _ODD_END
    memory: MemoryWatch = field(default_factory=MemoryWatch)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, control tokens included."""
        assert self.engine.tokenizer is not None
        return list(self.engine.tokenizer.encode(text, add_special_tokens=False))


PLANTS: tuple[Setting, ...] = (
    Setting("qwen2", prefill_chunk_tokens=37),
    Setting("gemma3", parks=True),
    Setting("olmo3", "CHATML_THINKING", prefill_chunk_tokens=16),
    Setting("llama_multi_head", "CHANGES_THE_CLOSE", tools=False, appends=False),
    Setting("mistral_sliding", prefill_chunk_tokens=11, parks=True),
    Setting("qwen3_moe", "LLAMA", tools=False),
)
"""Full attention, sliding layers beside it and alone, experts; templates that append, that rewrite
earlier turns, and that must be rendered again."""


@lru_cache
def _grown(setting: Setting) -> tuple[Any, Any, Any]:
    """Model, twin and tokenizer of a setting."""
    special, eos, bos = TEMPLATES[setting.template]
    tokenizer = chatml_tokenizer(
        getattr(chat_templates, setting.template),
        special_tokens=special,
        eos_token=eos,
        bos_token=bos,
    )
    family = next(item for item in FAMILIES if item.name == setting.family)
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_TOKENS,
        "bos_token_id": None,
        "eos_token_id": [tokenizer.convert_tokens_to_ids(_ODD_END)],
        "pad_token_id": None,
    }
    model, twin = (build_model(family, **options) for _ in range(2))
    return model, twin, tokenizer


def plant(setting: Setting, folder: Path) -> Plant:
    """A setting with an engine of its own, over weights that others use too.

    Args:
        setting: Which model, template and engine.
        folder: For sessions that are parked.
    """
    model, twin, tokenizer = _grown(setting)
    limits = ParkingLimits(device_bytes=_PARKING_BYTES, directory=folder)
    engine = Engine(
        model,
        tokenizer,
        prefill_chunk_tokens=setting.prefill_chunk_tokens,
        parking=limits if setting.parks else None,
    )
    return Plant(engine, twin, setting, TEMPLATES[setting.template][1])
