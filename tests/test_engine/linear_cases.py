"""Random cases for linear layers over few rows, each checked against float32.

They run in this process on a CUDA device, and in a child process under Triton's interpreter:
`python -m tests.test_engine.linear_cases COUNT`, with TRITON_INTERPRET=1. Results are poisoned
before every launch.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sfi_agent.engine.kernels import linear
from sfi_agent.engine.kernels.linear import (
    launch_linear,
    plan_for,
    skinny_gated,
    skinny_linear,
)
from sfi_agent.engine.kernels.linear_plans import LinearPlan
from tests.test_engine.kernel_cases import draw, dtypes, interpreter_problem

NAN = float("nan")


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """Equality up to the rounding of sums in float32 and of results in their dtype."""
    near = 4 * torch.finfo(got.dtype).eps
    bound = max(near, 1e-5) * exact.abs().max().item()
    torch.testing.assert_close(got.float(), exact.float(), rtol=max(near, 1e-5), atol=bound)


def exact_gate(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up round to the dtype first, as two layers do."""
    gated, other = (
        functional.linear(x.float(), weight.float()).to(x.dtype).float() for weight in (gate, up)
    )
    return functional.silu(gated) * other


def any_plan(choose: random.Random, rows: int, width: int) -> LinearPlan:
    """Any tile sizes that fit a device, sensible or not."""
    return LinearPlan(
        block_outputs=choose.choice([4, 8, 16]) if rows == 1 else choose.choice([16, 32]),
        block_inputs=choose.choice([16, 32, 64]) if width < 1000 else 256,
        splits=1 if rows == 1 else choose.choice([1, 2, 3, 5]),
        warps=choose.choice([1, 2, 4]),
        stages=choose.choice([1, 2, 3]),
        prefetch_inputs=choose.choice([0, 64, 256]),
        early_launch=False,
    )


def check_linear(seed: int, device: torch.device, widths: Sequence[int]) -> None:
    """Layers of random sizes, by the operations and by launches with any plan."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype, width = choose.choice(dtypes(device)), choose.choice(list(widths))
    rows = choose.choice([1, 1, 2, 3, 8, 15, 16])
    sizes = [choose.choice([1, 7, 33, 48, 130]) for _ in range(choose.choice([1, 2, 3, 4]))]
    x = draw(rows, width, dtype=dtype, device=device)
    weights = [draw(size, width, dtype=dtype, device=device) / width**0.5 for size in sizes]
    biases = [
        draw(size, dtype=dtype, device=device) if choose.random() < 0.5 else None for size in sizes
    ]
    exact = [
        functional.linear(x.float(), w.float(), None if b is None else b.float())
        for w, b in zip(weights, biases, strict=True)
    ]
    for got, expected in zip(skinny_linear(x, weights, biases), exact, strict=True):
        assert got.dtype is dtype
        assert_rounded(got, expected)
    planned = plan_for(x, sizes[:3])
    for plan in (any_plan(choose, rows, width), replace(planned, early_launch=False), planned):
        outs = [torch.full((rows, size), NAN, device=device).to(dtype) for size in sizes[:3]]
        launch_linear(outs, x, weights[:3], biases[:3], plan)
        for got, expected in zip(outs, exact, strict=False):
            assert_rounded(got, expected)
    check_gated(choose, x, weights[0])
    assert not any(kept.any() for kept in linear._kept_counters.values()), "not ready to go on"


def check_gated(choose: random.Random, x: Tensor, gate: Tensor) -> None:
    rows, width = x.shape
    up = draw(*gate.shape, dtype=x.dtype, device=x.device) / width**0.5
    exact = exact_gate(x, gate, up)
    assert_rounded(skinny_gated(x, gate, up), exact)
    out = torch.full((rows, gate.shape[0]), NAN, device=x.device).to(x.dtype)
    plan = any_plan(choose, rows, width)
    launch_linear([out], x, [gate, up], [None, None], plan, gated=True)
    assert_rounded(out, exact)


def check_rows(device: torch.device, width: int, dtype: torch.dtype) -> None:
    """A row has the same bits whatever rows it stands with, and a second time."""
    torch.manual_seed(0)
    x = draw(16, width, dtype=dtype, device=device)
    weight = draw(40, width, dtype=dtype, device=device)
    (whole,) = skinny_linear(x, [weight])
    for some in (slice(0, 16), slice(2, 4), slice(9, 16)):
        assert torch.equal(skinny_linear(x[some], [weight])[0], whole[some])
    (alone,) = skinny_linear(x[5:6], [weight])
    assert_rounded(alone, whole[5:6])


def main(count: int) -> None:
    problem = interpreter_problem()
    if problem is not None:
        print("unusable:", problem)
        return
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    for seed in range(count):
        check_linear(seed, cpu, [72, 130, 384])
    check_linear(count, cpu, [2560])
    check_rows(cpu, 384, torch.float16)
    print("checked", count)


if __name__ == "__main__":
    main(int(sys.argv[1]))
