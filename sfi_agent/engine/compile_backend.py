"""A torch.compile backend for decoding steps: linear layers read once, the rest by inductor.

Dynamo's graph is rewritten (see `linear_pass.py`) before inductor sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from sfi_agent.engine.linear_pass import replace_linears

__all__ = ["StepBackend", "early_step_backend", "has_early_launch", "step_backend"]


class StepBackend:
    """The backend with its options: `torch.compile(layer, backend=StepBackend())`.

    Args:
        inner: What compiles the rewritten graph; None is inductor.
        force: Also replace layers where the kernels do not run, for tests.
        early_launch: Inductor's own kernels start while their predecessors finish (programmatic
            dependent launch, where the device has it), so that weights are fetched meanwhile.
    """

    def __init__(
        self,
        inner: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]] | None = None,
        *,
        force: bool = False,
        early_launch: bool = False,
    ) -> None:
        self._inner = inner
        self._force = force
        self._early_launch = early_launch
        self.replaced: list[int] = []
        """Operations put into each graph so far."""

    def __call__(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        self.replaced.append(replace_linears(graph_module, force=self._force))
        if self._inner is not None:
            return self._inner(graph_module, example_inputs)
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        # Whole steps are captured by the caller, so inductor captures nothing itself.
        patches: dict[str, Any] = {"triton.cudagraphs": False, "max_autotune": False}
        if self._early_launch and has_early_launch() and hasattr(config.triton, "enable_pdl"):
            patches["triton.enable_pdl"] = True
        compiled = compile_fx(graph_module, list(example_inputs), config_patches=patches)
        return cast(Callable[..., Any], compiled)


def has_early_launch() -> bool:
    """Whether the current device lets kernels start while the one before them finishes."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def step_backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """`StepBackend()` as a function, which is the same object every time."""
    return StepBackend()(graph_module, example_inputs)


def early_step_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """`StepBackend(early_launch=True)`, likewise."""
    return StepBackend(early_launch=True)(graph_module, example_inputs)
