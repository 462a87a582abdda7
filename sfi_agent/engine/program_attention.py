"""The attention of steps that are compiled and captured, as one operation a compiler can call.

The operation takes queries, keys and values and nothing else: what a layer attends to is looked up
in the program that is running. So one compiled layer serves all layers of a model, although they
differ in where their keys lie, and nothing about a program becomes a condition of the compiled
code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfi_agent.engine.attention_rule import AttentionRule

__all__ = ["ProgramContext", "ProgramLayers", "attend_in_program", "running"]


class ProgramLayers(Protocol):
    """What a running program computes for its layers, in the order they ask."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """Attention of the next layer; see `attend_in_program`."""
        ...

    def note_layer(self, index: int) -> None:
        """The layer that is about to ask, where it can be told."""
        ...


class ProgramContext:
    """Marks a forward pass whose attention belongs to the running program."""


class _Running(threading.local):
    layers: ProgramLayers | None = None


_running = _Running()


@contextmanager
def running(layers: ProgramLayers) -> Iterator[None]:
    """Let a program answer the attention calls of this thread for the length of a with block."""
    before = _running.layers
    _running.layers = layers
    try:
        yield
    finally:
        _running.layers = before


def attend_in_program(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one layer of the running program.

    Args:
        module: The attention layer.
        query: `[batch, query_heads, queries, key_dim]`, post-RoPE.
        keys: `[batch, kv_heads, queries, key_dim]`, the step's own.
        values: `[batch, kv_heads, queries, value_dim]`.
        scale: See `AttentionRule`, and so the others; one by one, because compilers see through
            numbers and tensors best.
        softcap: 0 for none.
        sinks: None for none.

    Returns:
        `[batch, queries, query_heads, value_dim]`.
    """
    if not torch.compiler.is_compiling():
        # In compiled code the index would become a condition, and every layer code of its own.
        assert _running.layers is not None, "no program is running"
        _running.layers.note_layer(int(module.layer_idx))  # type: ignore[arg-type]
    out: Tensor = torch.ops.sfi_agent.program_attention(query, keys, values, scale, softcap, sinks)
    return out


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    assert _running.layers is not None, "no program is running"
    return _running.layers.attend(query, keys, values, AttentionRule(scale, softcap, sinks))


_operation: Any = torch.library.custom_op(
    "sfi_agent::program_attention",
    _attend,
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, float scale, float softcap, Tensor? sinks) "
    "-> Tensor",
)


@_operation.register_fake  # type: ignore[untyped-decorator]
def _attend_fake(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    batch, heads, queries = query.shape[:3]
    return query.new_empty(batch, queries, heads, values.shape[-1])
