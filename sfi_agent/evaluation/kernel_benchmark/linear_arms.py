"""The arms of the linear layers: kernels that read all weights of an input once, beside torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sfi_agent.engine.kernels import linear_problem, skinny_gated, skinny_linear
from sfi_agent.engine.kernels.linear import plan_for
from sfi_agent.evaluation.kernel_benchmark.checks import check_linear
from sfi_agent.evaluation.kernel_benchmark.linear_sizes import LinearLayer
from sfi_agent.evaluation.kernel_benchmark.stopwatch import Arm, in_turn, steps_per_pass
from sfi_agent.evaluation.kernel_benchmark.workload import Workload

__all__ = ["make_linear_arms"]

Run = Callable[[Tensor, Sequence[Tensor], bool], list[Tensor]]


def make_linear_arms(
    workload: Workload, device: torch.device, most_copies: int | None = None
) -> Iterator[Arm]:
    """Every linear layer by the kernels and by torch, a row per sequence; none if left out.

    Args:
        workload: Sizes.
        device: Where the arms run.
        most_copies: Bound on the copies of each layer's weights, for a check; None for as many
            as the workload keeps apart.
    """
    generator = torch.Generator(device).manual_seed(2)
    dtype = workload.shape.dtype

    def draw(*size: int) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(generator=generator)

    for name, layer in workload.linear_layers.items():
        copies = workload.layers_apart(workload.linear_weight_bytes(layer))
        copies = copies if most_copies is None else min(copies, most_copies)
        x = draw(workload.batch, layer.width)
        weights = [
            [draw(size, layer.width).mul_(layer.width**-0.5) for size in layer.outputs]
            for _ in range(copies)
        ]
        for run, method in ((_kernels, _method(x, layer)), (_torch, "torch linear")):
            yield _arm(f"linear_{name}", workload, layer, x, weights, run, method)


def _kernels(x: Tensor, weights: Sequence[Tensor], gated: bool) -> list[Tensor]:
    return [skinny_gated(x, *weights)] if gated else skinny_linear(x, weights)


def _torch(x: Tensor, weights: Sequence[Tensor], gated: bool) -> list[Tensor]:
    outs = [functional.linear(x, weight) for weight in weights]
    return [functional.silu(outs[0]) * outs[1]] if gated else outs


def _method(x: Tensor, layer: LinearLayer) -> str:
    if linear_problem(x.device, x.dtype) is not None:
        return "reference"
    plan = plan_for(x, layer.outputs[:1] if layer.gated else layer.outputs, layer.gated)
    return f"Triton, {plan.splits} splits, tiles of {plan.block_outputs} x {plan.block_inputs}"


def _arm(
    name: str,
    workload: Workload,
    layer: LinearLayer,
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    run: Run,
    method: str,
) -> Arm:
    def step(copy: int) -> list[Tensor]:
        return run(x, weights[copy], layer.gated)

    baseline = f"{name}_torch"
    return Arm(
        baseline if run is _torch else name,
        in_turn(len(weights), step),
        lambda: check_linear(x, weights, layer.gated, step),
        steps_per_pass(len(weights)),
        workload.linear_bytes(layer),
        "layer",
        baseline="" if run is _torch else baseline,
        cached=workload.is_cached(workload.linear_weight_bytes(layer)),
        method=method,
    )
