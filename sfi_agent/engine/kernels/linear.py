"""Linear layers of decoding steps: all weights that share an input, read once in one launch.

With 1 to 16 rows a linear layer takes as long as reading its weights. Shapes: inputs
`[rows, in]`, weights `[out, in]` contiguous, results `[rows, out]` in the dtype of the inputs, sums
in float32. Results do not depend on timing, nor those of a row on other rows except that one row
alone rounds differently from 2 to 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sfi_agent.engine.kernels.availability import kernel_problem
from sfi_agent.engine.kernels.linear_plans import (
    MOST_COUNTERS,
    MOST_ROWS,
    LinearPlan,
    plan_linear,
)
from sfi_agent.engine.kernels.plans import device_limits
from sfi_agent.observe.log import log_event

__all__ = ["launch_linear", "linear_problem", "plan_for", "skinny_gated", "skinny_linear"]

_WEIGHTS_PER_LAUNCH = 3
_ANY_HEAD = 64
"""Stands for the head size where `kernel_problem` asks for one."""


def skinny_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Each `x @ weight.T + bias`.

    Args:
        x: `[rows, in]`, 1 to 16 rows.
        weights: `[out_i, in]` each, contiguous, in the dtype of `x`.
        biases: `[out_i]` or None for each weight; None for no biases at all.

    Returns:
        `[rows, out_i]` each.
    """
    known = [None] * len(weights) if biases is None else list(biases)
    outs: list[Tensor] = torch.ops.sfi_agent.skinny_linear(x, list(weights), known)
    return outs


def skinny_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, rounded after each of the three as separate layers are.

    Args:
        x: `[rows, in]`, 1 to 16 rows.
        gate: `[out, in]`, contiguous, in the dtype of `x`.
        up: As `gate`.

    Returns:
        `[rows, out]`.
    """
    out: Tensor = torch.ops.sfi_agent.skinny_gated(x, gate, up)
    return out


def linear_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from running on such tensors, in words; None if nothing does."""
    return kernel_problem(device, dtype, _ANY_HEAD, _ANY_HEAD)


@cache
def _uses_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to launch kernels; the choice and its reason are logged once per combination."""
    problem = linear_problem(device, dtype)
    values = {"device": str(device), "dtype": str(dtype), "reason": problem or "supported"}
    if problem is None or device.type == "cpu":
        kernels = "triton" if problem is None else "reference"
        log_event("debug", "linear_kernels_chosen", kernels=kernels, **values)
    else:
        log_event("warning", "linear_kernels_missing", **values)
    return problem is None


@cache
def _early_launch(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


_kept_counters: dict[torch.device, Tensor] = {}


def _counters(device: torch.device) -> Tensor | None:
    """Counters of split launches, zero between launches; None if it is too late to make them.

    One set serves a device: launches with splits must not overlap, so steps that were captured on
    one device are not to be replayed on two streams at once. Zeros made while a graph is captured
    would be written by its replay only, so none are made then; a first call outside makes them.
    """
    found = _kept_counters.get(device)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        found = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
        _kept_counters[device] = found
    return found


def plan_for(x: Tensor, outputs: Sequence[int], gated: bool = False) -> LinearPlan:
    """The plan of one launch over `x` `[rows, in]` with weights of these output sizes."""
    return plan_linear(
        x.shape[0] == 1, x.shape[1], tuple(outputs), gated, x.element_size(),
        _multiprocessors(x.device), _early_launch(x.device),
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return device_limits(device).multiprocessors


def launch_linear(
    outs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: LinearPlan,
    gated: bool = False,
) -> None:
    """Launch the kernel on contiguous tensors, results into `outs`.

    Args:
        outs: `[rows, out_i]`, one per weight; gated, one.
        x: `[rows, in]`, 1 to 16 rows.
        weights: 1 to 3 of `[out_i, in]`; gated, gate and up.
        biases: `[out_i]` or None, one per weight; all None where gated.
        plan: Tile sizes; results depend on them by rounding.
        gated: Whether to write `silu(gate) * up`.
    """
    from sfi_agent.engine.kernels.linear_kernel import linear_kernel

    rows, width = x.shape
    assert 1 <= rows <= MOST_ROWS and 1 <= len(weights) <= _WEIGHTS_PER_LAUNCH
    assert all(w.is_contiguous() and w.dtype is x.dtype and w.shape[1] == width for w in weights)
    outputs = [out.shape[1] for out in outs]
    programs = plan.programs(outputs, gated)
    partial, counters = outs[0], outs[0]
    splits = 1 if rows == 1 else plan.splits
    if splits > 1:
        kept = _counters(x.device)
        splits = 1 if kept is None or programs > MOST_COUNTERS else splits
        counters = counters if kept is None else kept
        shape = (programs * splits * MOST_ROWS * plan.block_outputs,)
        partial = x.new_empty(shape if splits > 1 else 1, dtype=torch.float32)
    options = {"launch_pdl": True} if plan.early_launch else {}
    linear_kernel[(programs, splits)](
        x, *_filled(weights), *_filled([x if bias is None else bias for bias in biases]),
        *_filled(outs), *_filled(outputs), width, rows, partial, counters,
        COUNT=len(weights), GATED=gated,
        BIAS=sum(1 << index for index, bias in enumerate(biases) if bias is not None),
        ROWS=1 if rows == 1 else MOST_ROWS, BLOCK_OUT=plan.block_outputs,
        BLOCK_IN=plan.block_inputs, EVEN_IN=width % plan.block_inputs == 0, SPLITS=splits,
        STAGES=plan.stages, PREFETCH=plan.prefetch_inputs, PDL=plan.early_launch,
        num_warps=plan.warps, num_stages=plan.stages, **options,
    )  # fmt: skip


def _filled(items: Sequence[Any]) -> list[Any]:
    """As many as the kernel has places, the last repeated."""
    return [*items, *[items[-1]] * (_WEIGHTS_PER_LAUNCH - len(items))]


def reference_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """The same as `skinny_linear` in plain float32 torch."""
    pairs = zip(weights, biases, strict=True)
    return [
        functional.linear(x.float(), w.float(), None if b is None else b.float()).to(x.dtype)
        for w, b in pairs
    ]


def reference_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The same as `skinny_gated` in plain float32 torch."""
    gated, other = reference_linear(x, [gate, up], [None, None])
    return functional.silu(gated) * other


def _linear_op(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    if not _uses_kernels(x.device, x.dtype):
        return reference_linear(x, weights, biases)
    x = x.contiguous()
    outs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    for first in range(0, len(weights), _WEIGHTS_PER_LAUNCH):
        some = slice(first, first + _WEIGHTS_PER_LAUNCH)
        plan = plan_for(x, [out.shape[1] for out in outs[some]])
        launch_linear(outs[some], x, weights[some], biases[some], plan)
    return outs


def _gated_op(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    if not _uses_kernels(x.device, x.dtype):
        return reference_gated(x, gate, up)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], gate.shape[0])
    plan = plan_for(x, [gate.shape[0]], gated=True)
    launch_linear([out], x, [gate, up], [None, None], plan, gated=True)
    return out


_linear_operation: Any = torch.library.custom_op(
    "sfi_agent::skinny_linear",
    _linear_op,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
)
_gated_operation: Any = torch.library.custom_op(
    "sfi_agent::skinny_gated",
    _gated_op,
    mutates_args=(),
    schema="(Tensor x, Tensor gate, Tensor up) -> Tensor",
)


@_linear_operation.register_fake  # type: ignore[untyped-decorator]
def _linear_fake(x: Tensor, weights: list[Tensor], biases: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@_gated_operation.register_fake  # type: ignore[untyped-decorator]
def _gated_fake(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])
