"""Conversations on tiny real models: engines with chat templates, scripted answers, and the checks
that every conversation must pass whatever happened in it."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sfi_agent import Engine, Session, SessionConfig
from tests import chat_templates
from tests.families import FAMILIES, build_model
from tests.scripted import Script
from tests.test_guarantees.play import close
from tests.test_session.helpers import FAMILIES as TEMPLATES
from tests.tiny_tokenizers import chatml_tokenizer

__all__ = [
    "DENSE",
    "FULL",
    "SPARSE",
    "call_text",
    "chat_engine",
    "encode",
    "fresh_logits",
    "policy",
    "require_whole",
    "says",
]

CONTEXT_TOKENS = 2048

_PROMPT_END = "<|im_start|>assistant\n{% endif -%}\n"
_SOURCES = {
    "OPENS_THOUGHTS": chat_templates.CHATML.replace(
        _PROMPT_END, _PROMPT_END.replace("assistant\n", "assistant\n<think>\n")
    )
}
_TWINS: dict[Engine, Any] = {}
"""For each engine its weights in a model that no session ever touches."""


def policy(**overrides: Any) -> SessionConfig:
    """A policy with short segments, so that short answers hold slow and fast steps."""
    values: dict[str, Any] = {
        "memory": {"sink_tokens": 2, "selected_tokens": 16, "recent_tokens": 8},
        "refresh": {"min_segment_tokens": 2, "max_segment_tokens": 6},
        "sampling": {"max_new_tokens": 96},
    }
    for key, value in overrides.items():
        values[key] = {**values[key], **value} if key in values else value
    return SessionConfig(**values)


DENSE = policy(mode="dense")
FULL = policy(memory={"selected_tokens": CONTEXT_TOKENS})
SPARSE = policy()


@lru_cache
def chat_engine(
    template: str | None = "CHATML",
    family: str = "qwen2",
    *,
    context_tokens: int = CONTEXT_TOKENS,
    eos_ids: tuple[int, ...] = (),
    prefill_chunk_tokens: int | None = None,
) -> Engine:
    """An engine whose model has the vocabulary of its tokenizer. Shared: leave it as it is.

    Args:
        template: Name in `tests.chat_templates` or "OPENS_THOUGHTS", which begins the reasoning
            itself; None for a tokenizer without a template.
        family: Name in `tests.families`.
        context_tokens: The model's context.
        eos_ids: What the model's generation configuration says about its end.
        prefill_chunk_tokens: See `Engine`.
    """
    special, eos, bos = TEMPLATES.get(template or "CHATML", ((), "<|im_end|>", None))
    source = _SOURCES.get(template) or getattr(chat_templates, template) if template else None
    tokenizer = chatml_tokenizer(source, special_tokens=special, eos_token=eos, bos_token=bos)
    model = build_model(
        next(item for item in FAMILIES if item.name == family),
        vocab_size=len(tokenizer),
        max_position_embeddings=context_tokens,
        bos_token_id=None,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=None,
    )
    engine = Engine(model, tokenizer, prefill_chunk_tokens=prefill_chunk_tokens)
    _TWINS[engine] = deepcopy(model)
    return engine


def encode(engine: Engine, text: str) -> list[int]:
    """Ids of a text, control tokens included."""
    assert engine.tokenizer is not None
    return list(engine.tokenizer.encode(text, add_special_tokens=False))


def says(engine: Engine, *outputs: str | list[int]) -> Script:
    """What the model says in its next turns, as texts or ids, stop tokens included."""
    ids = [encode(engine, item) if isinstance(item, str) else item for item in outputs]
    return Script(engine.model, ids)


def call_text(tool: str, /, **arguments: Any) -> str:
    """A call as Hermes-like templates write it."""
    body = json.dumps({"name": tool, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


@torch.no_grad()
def fresh_logits(engine: Engine, ids: list[int]) -> Tensor:
    """Logits after these ids, by the model's own attention and, equal to it, a dense session."""
    own = _TWINS[engine](torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    with engine.session(DENSE) as fresh:
        assert fresh.decode(ids, max_new_tokens=0) == []
        assert close(fresh.next_logits(), own)
    logits: Tensor = own
    return logits


def require_whole(session: Session, *, exact: bool = True) -> None:
    """Ids, messages, trace and history of a session agree with each other.

    Args:
        session: Of an engine without anything scripted.
        exact: The history also equals a recompute of the ids; not so for small budgets.
    """
    ids, core = session.token_ids, session._core
    if session._chat is not None:
        transcript = session._chat.transcript
        assert list(transcript.token_ids) == ids
        edges = [0, *(span.end for span in transcript.spans)]
        assert edges[:-1] == [span.start for span in transcript.spans]
    assert all(ids[record.position] == record.token_id for record in session.trace)
    assert session.stats.history_tokens == core.processed_tokens
    for layer in session._core._opened().sequence.layers:
        assert layer.history.tokens == core.processed_tokens
    if exact and ids:
        assert close(session.next_logits(), fresh_logits(session.engine, ids))
