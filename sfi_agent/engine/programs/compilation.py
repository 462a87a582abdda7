"""A model's layers compiled while a program is warmed up and captured, and as before afterwards.

Every module is compiled for itself, so all layers share one compiled code: what differs between
them (weights, where their keys lie) is an input or is looked up while the code runs. Compiled code
is kept on disk by torch and Triton, so that a second process only traces.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compiled_modules", "modules_to_compile"]

_MOST_VARIANTS = 64
"""Batch sizes x kinds of layers that one module class may be compiled for."""


def modules_to_compile(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, the final norm and the head, where they are found."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    others = [getattr(decoder, "norm", None), model.get_output_embeddings()]
    return [*layers, *(module for module in others if isinstance(module, nn.Module))]


@contextmanager
def compiled_modules(
    model: PreTrainedModel, backend: Callable[..., Any], on_progress: Callable[[str], None]
) -> Iterator[None]:
    """Let calls of the model run compiled code for the length of a with block.

    Args:
        model: In eval mode.
        backend: The same object every time, so that compiled code is found again.
        on_progress: Told when something was compiled.
    """
    modules = modules_to_compile(model)
    _progress.say = on_progress
    before = [module._compiled_call_impl for module in modules]
    with torch._dynamo.config.patch(
        recompile_limit=_MOST_VARIANTS, accumulated_recompile_limit=4 * _MOST_VARIANTS
    ):
        try:
            for module in modules:
                call = _linear_call(module) if type(module) is nn.Linear else module._call_impl
                # What `module.compile` sets, which leaves torch's own modules as they are.
                module._compiled_call_impl = torch.compile(
                    call, backend=_timed(backend), dynamic=False
                )
            yield
        finally:
            for module, compiled in zip(modules, before, strict=True):
                module._compiled_call_impl = compiled


def _linear_call(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A linear layer as a function that the compiler follows."""

    def call(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, module.weight, module.bias)

    return call


@cache
def _timed(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, saying how long it took; one object per backend, since it is compared."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        started = time.perf_counter()
        with warnings.catch_warnings():
            # Of deprecations within the compiler; a host that makes them errors still compiles.
            warnings.simplefilter("ignore")
            compiled = backend(graph, inputs)
        _progress.say(f"compiled a part of the model in {time.perf_counter() - started:.1f} s")
        return compiled

    return compile_graph


class _Progress:
    """Who is told, while modules are compiled; backends outlive those who listen."""

    say: Callable[[str], None] = staticmethod(lambda _: None)


_progress = _Progress()
