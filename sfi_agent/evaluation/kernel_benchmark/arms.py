"""The arms of one workload's attention: every step kernel, and torch on the same shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from sfi_agent.engine.kernels import (
    AttentionOptions,
    AttentionPlan,
    attend,
    device_limits,
    gather,
    plan_attention,
    rank,
    select,
    uses_kernels,
)
from sfi_agent.evaluation.kernel_benchmark import checks
from sfi_agent.evaluation.kernel_benchmark.buffers import Buffers, Pool, Step
from sfi_agent.evaluation.kernel_benchmark.stopwatch import Arm, in_turn, steps_per_pass
from sfi_agent.evaluation.kernel_benchmark.workload import Workload

__all__ = ["make_arms", "make_copy"]


def make_copy(workload: Workload, device: torch.device) -> Arm:
    """The measure of bandwidth: `clone` of a buffer, read once and written once.

    Not replayed from a graph, where a copy becomes a slower kind of node.
    """
    source = torch.ones(workload.copy_bytes // 4, device=device)

    def check() -> None:
        assert torch.equal(source.clone(), source), "a copy differs from its source"

    return Arm(
        "copy", source.clone, check, 1, 2 * source.nbytes, "buffer", method="clone", captured=False
    )


def make_arms(buffers: Buffers, planned: Workload) -> Iterator[Arm]:
    """Every arm on these buffers; linear layers are in `linear_arms`.

    Args:
        buffers: What they work on.
        planned: The workload whose attention plans are taken, so that a check on small buffers
            compiles and runs the kernels that are timed on large ones.
    """
    sizes = [("fast", buffers.memory, planned.shape.memory_tokens, 1)]
    sizes += [("dense", buffers.history, planned.context_tokens, 1)]
    for queries in planned.shape.block_queries:
        sizes.append((f"block_{queries}", buffers.history, planned.context_tokens, queries))
    for name, pool, tokens, queries in sizes:
        step, plan = buffers.step(queries), _plan(buffers, planned, tokens, queries)
        yield _attention(name, buffers, pool, step, plan)
        if pool is buffers.history:
            yield _attention(f"{name}_evidence", buffers, pool, step, plan)
        yield _torch_attention(name, buffers, pool, step)
    for dtype in (torch.float32, torch.float16):
        yield _rank(buffers, dtype)
    yield _select(buffers)
    yield _gather(buffers)


def _plan(buffers: Buffers, planned: Workload, tokens: int, queries: int) -> AttentionPlan:
    shape = planned.shape
    return plan_attention(
        planned.batch * shape.kv_heads,
        queries * shape.group,
        tokens,
        shape.head_size,
        shape.dtype.itemsize,
        device_limits(buffers.device),
    )


def _method(buffers: Buffers, detail: str = "") -> str:
    shape = buffers.workload.shape
    kernels = uses_kernels(buffers.device, shape.dtype, shape.head_size, shape.head_size)
    return f"Triton{detail}" if kernels else "reference"


def _attention(name: str, buffers: Buffers, pool: Pool, step: Step, plan: AttentionPlan) -> Arm:
    workload, with_evidence = buffers.workload, name.endswith("_evidence")
    queries = step.query.shape[1]
    options = AttentionOptions(workload.shape.head_size**-0.5)

    def layer_step(layer: int) -> tuple[Tensor, Tensor]:
        extents = pool.table.layer(layer)
        evidence = buffers.evidence(layer) if with_evidence else None
        return attend(
            step.query, step.keys, step.values, extents, buffers.starts, pool.ends,
            buffers.counters, plan, options, evidence,
        )  # fmt: skip

    def check() -> None:
        checks.check_attention(buffers, pool, step, layer_step, options.scale, with_evidence)

    return Arm(
        name,
        in_turn(pool.buffers, layer_step),
        check,
        steps_per_pass(pool.buffers),
        workload.attention_bytes(pool.tokens, queries, evidence=with_evidence),
        "layer",
        queries,
        f"{name.removesuffix('_evidence')}_torch",
        workload.is_cached(workload.extent_bytes(pool.tokens)),
        _method(buffers, f", {plan.splits} splits of {plan.block_rows} rows"),
    )


def _torch_attention(name: str, buffers: Buffers, pool: Pool, step: Step) -> Arm:
    """`scaled_dot_product_attention` with the heads of a group as rows, so that they share reads.

    It appends nothing and masks nothing among the new tokens, which spares it work.
    """
    workload, queries = buffers.workload, step.query.shape[1]
    shape, stop = workload.shape, pool.tokens + queries
    grouped = step.query.unflatten(2, (shape.kv_heads, shape.group)).permute(0, 2, 3, 1, 4)
    rows = grouped.flatten(2, 3).contiguous()
    backend = _backend(rows, pool.keys[0, :, :, :stop])

    def layer_step(layer: int) -> Tensor:
        keys, values = pool.keys[layer, :, :, :stop], pool.values[layer, :, :, :stop]
        within = nullcontext() if backend is None else torch.nn.attention.sdpa_kernel(backend)
        with within:
            return torch.nn.functional.scaled_dot_product_attention(rows, keys, values)

    def check() -> None:
        checks.check_torch_attention(buffers, pool, step, layer_step)

    return Arm(
        f"{name}_torch",
        in_turn(pool.buffers, layer_step),
        check,
        steps_per_pass(pool.buffers),
        workload.sdpa_bytes(pool.tokens, queries),
        "layer",
        queries,
        cached=workload.is_cached(workload.extent_bytes(pool.tokens)),
        method="torch SDPA" if backend is None else f"torch SDPA, {backend.name.lower()}",
    )


def _backend(rows: Tensor, keys: Tensor) -> torch.nn.attention.SDPBackend | None:
    """Flash attention where it can run, else the memory-efficient one; None on a CPU."""
    from torch.backends.cuda import (
        SDPAParams,
        can_use_efficient_attention,
        can_use_flash_attention,
    )
    from torch.nn.attention import SDPBackend

    if rows.device.type != "cuda":
        return None
    parameters = SDPAParams(rows, keys, keys, None, 0.0, False, False)
    if can_use_flash_attention(parameters):
        return SDPBackend.FLASH_ATTENTION
    if can_use_efficient_attention(parameters):
        return SDPBackend.EFFICIENT_ATTENTION
    return SDPBackend.MATH


def _rank_all(buffers: Buffers, dtype: torch.dtype) -> None:
    shape, logits = buffers.workload.shape, buffers.logits[dtype]
    for layer in range(shape.layers):
        rank(
            logits[layer % len(logits)],
            buffers.lse,
            buffers.ranked_tokens,
            buffers.scratch.layer(layer),
            shape.sink_tokens,
            shape.recent_tokens,
        )


def _rank(buffers: Buffers, dtype: torch.dtype) -> Arm:
    workload, size = buffers.workload, dtype.itemsize
    return Arm(
        "rank" if dtype is torch.float32 else "rank_float16",
        lambda: _rank_all(buffers, dtype),
        lambda: checks.check_ranking(buffers, dtype, lambda: _rank_all(buffers, dtype)),
        1,
        workload.rank_bytes(size, buffers.scratch.peak_tokens),
        "all layers",
        cached=workload.is_cached(workload.evidence_bytes(size)),
        method=_method(buffers),
    )


def _select(buffers: Buffers) -> Arm:
    workload, shape = buffers.workload, buffers.workload.shape

    def run() -> tuple[Tensor, Tensor]:
        return select(
            buffers.scratch,
            buffers.ranked_tokens,
            shape.selected_tokens,
            shape.sink_tokens,
            shape.recent_tokens,
        )

    def prepare() -> None:
        _rank_all(buffers, torch.float32)

    return Arm(
        "select",
        run,
        lambda: checks.check_selection(buffers, prepare, run),
        1,
        workload.select_bytes(buffers.scratch.peak_tokens),
        "all layers",
        method=_method(buffers),
        prepare=prepare,
    )


def _gather(buffers: Buffers) -> Arm:
    workload, shape = buffers.workload, buffers.workload.shape

    def run() -> None:
        gather(
            buffers.history.table,
            buffers.memory.table,
            buffers.positions,
            buffers.counts,
            buffers.history.ends,
            buffers.gathered_starts,
            selected_capacity=shape.selected_tokens,
            sink_tokens=shape.sink_tokens,
            recent_tokens=shape.recent_tokens,
        )

    return Arm(
        "gather",
        run,
        lambda: checks.check_gather(buffers, run),
        1,
        workload.gather_bytes,
        "all layers",
        cached=workload.is_cached(workload.extent_bytes(shape.memory_tokens)),
        method=_method(buffers),
    )
