"""Attention of a step over a batch of sequences, each with its own extents and length.

One operation serves fast steps (extents point at memories), slow steps (at histories, with
evidence) and blocks of rectify and verify (several queries): the new tokens are appended in the
same launch, and lengths are read on the device. Shapes have a batch axis here:

    query `[batch, queries, query_heads, key_dim]`, new keys and values
    `[batch, queries, kv_heads, dim]`; query i of a sequence is its token `ends + i`.

Softmax over `[start, end)` of each KV head plus the step's own tokens up to the query's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfi_agent.engine.kernels.availability import uses_kernels
from sfi_agent.engine.kernels.options import AttentionOptions, EvidenceBuffers
from sfi_agent.engine.kernels.plans import AttentionPlan
from sfi_agent.engine.kernels.reference import ReferenceCall, reference_attend
from sfi_agent.engine.kernels.tables import LayerExtents

__all__ = ["attend", "launch_attend", "merge_parts"]


def attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    extents: LayerExtents,
    starts: Tensor,
    ends: Tensor,
    counters: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    evidence: EvidenceBuffers | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one layer in one step.

    Args:
        query: `[batch, queries, query_heads, key_dim]`, post-RoPE.
        new_keys: `[batch, queries, kv_heads, key_dim]`, the step's own tokens.
        new_values: `[batch, queries, kv_heads, value_dim]`.
        extents: Where the earlier tokens lie. The extent that holds position `ends` has room
            for the new tokens if they are appended.
        starts: `[batch, kv_heads]` int64 on the device, the first visible position; 0 where
            evidence is asked for.
        ends: `[batch]` int64 on the device, the number of tokens before the step's own.
        counters: `[at least plan.counters(...)]` int32 on the device, zero before the first call
            and after every call; launches that may overlap need their own.
        plan: Tile sizes and number of splits; results depend on it by rounding.
        options: See `AttentionOptions`.
        evidence: Where to write evidence; None writes none.

    Returns:
        Outputs `[batch, queries, query_heads, value_dim]` in the dtype of `query` (not to be used
        without values) and log-sum-exps in nats, `[batch, query_heads, queries]` float32, -inf for
        a query that sees nothing (its output is 0).
    """
    _check(query.shape[1], options, evidence)
    if not uses_kernels(query.device, query.dtype, query.shape[-1], new_values.shape[-1]):
        return _attend_slowly(query, new_keys, new_values, extents, starts, ends, options, evidence)
    out, lse = torch.ops.sfi_agent.attend(
        query.contiguous(),
        new_keys.contiguous(),
        new_values.contiguous(),
        extents.fields,
        starts,
        ends,
        counters,
        None if evidence is None else evidence.logits,
        None if evidence is None else evidence.rest_mass,
        *_numbers(options),
        *_numbers_of_evidence(evidence),
        plan.as_list(),
    )
    return out, lse


def _check(queries: int, options: AttentionOptions, evidence: EvidenceBuffers | None) -> None:
    assert options.own_tokens or not options.append, "tokens not attended are not appended"
    assert options.own_tokens or not options.window, "windows need the queries' own positions"
    if evidence is not None:
        assert 0 < evidence.queries <= queries, "evidence is asked of queries that are not there"
        assert not options.window, "sliding layers have no evidence"


def _numbers(options: AttentionOptions) -> tuple[float, float, int, bool, bool, bool]:
    return (
        options.scale,
        options.softcap,
        options.window,
        options.append,
        options.own_tokens,
        options.with_values,
    )


def _numbers_of_evidence(evidence: EvidenceBuffers | None) -> tuple[int, int, int]:
    if evidence is None:
        return 0, 0, 0
    return evidence.sink_tokens, evidence.recent_tokens, evidence.queries


def _attend_slowly(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    extents: LayerExtents,
    starts: Tensor,
    ends: Tensor,
    options: AttentionOptions,
    evidence: EvidenceBuffers | None,
) -> tuple[Tensor, Tensor]:
    call = ReferenceCall(
        options.scale,
        options.softcap,
        options.window,
        *_numbers_of_evidence(evidence),
        options.append,
        options.own_tokens,
    )
    buffers = (None, None) if evidence is None else (evidence.logits, evidence.rest_mass)
    return reference_attend(
        query, new_keys, new_values, extents.places, starts, ends, call, *buffers
    )


def merge_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax out of several over disjoint tokens, such as a shared prefix and own tokens.

    Args:
        parts: Outputs `[batch, queries, query_heads, value_dim]` and log-sum-exps
            `[batch, query_heads, queries]` float32, -inf where a part saw nothing.

    Returns:
        Outputs like those of the parts; 0 for a query that sees nothing in any part.
    """
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    total = lses.logsumexp(dim=0)
    shares = (lses - total.where(total > float("-inf"), 0.0)).exp()
    outs = torch.stack([out.float() for out, _ in parts])
    return (outs * shares[..., None]).sum(dim=0).to(parts[0][0].dtype)


def _attend_op(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    table: Tensor,
    starts: Tensor,
    ends: Tensor,
    counters: Tensor,
    evidence: Tensor | None,
    rest_mass: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    append: bool,
    own_tokens: bool,
    with_values: bool,
    sink_tokens: int,
    recent_tokens: int,
    evidence_queries: int,
    plan: list[int],
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(query, new_values)
    launch_attend(
        out, lse, query, new_keys, new_values, table, starts, ends, counters, evidence, rest_mass,
        scale, softcap, window, append, own_tokens, with_values, sink_tokens, recent_tokens,
        evidence_queries, AttentionPlan.from_list(plan),
    )  # fmt: skip
    return out, lse


def _empty_results(query: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, query_heads, _ = query.shape
    out = query.new_empty(batch, queries, query_heads, new_values.shape[-1])
    lse = query.new_empty(batch, query_heads, queries, dtype=torch.float32)
    return out, lse


def launch_attend(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    table: Tensor,
    starts: Tensor,
    ends: Tensor,
    counters: Tensor,
    evidence: Tensor | None,
    rest_mass: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
    append: bool,
    own_tokens: bool,
    with_values: bool,
    sink_tokens: int,
    recent_tokens: int,
    evidence_queries: int,
    plan: AttentionPlan,
) -> None:
    """Launch the kernel on contiguous tensors, results into `out` and `lse` (see `attend`)."""
    from sfi_agent.engine.kernels.attention_kernel import attend_kernel

    batch, queries, query_heads, key_dim = query.shape
    kv_heads, value_dim = new_values.shape[2:]
    pairs, group = batch * kv_heads, query_heads // kv_heads
    row_blocks = -(-queries * group // plan.block_rows)
    kept = min(plan.block_rows, _power_of_two(queries * group))
    assert counters.numel() >= pairs * row_blocks, "too few counters"
    assert starts.shape == (batch, kv_heads) and ends.shape == (batch,)
    assert evidence is None or evidence.flatten(0, -2).stride(0) == evidence.stride(-2)
    shares = pairs * row_blocks * plan.splits * kept if plan.splits > 1 else 0
    partial = lse.new_empty(shares * value_dim if with_values else 0)
    partial_lse, partial_rest = lse.new_empty(2, shares)
    value_block = max(16, _power_of_two(value_dim))
    splits_block = _power_of_two(plan.splits)
    own_rows = evidence_queries in (0, queries) and row_blocks == 1
    evidence_block = 0 if own_rows else max(16, _power_of_two(evidence_queries * group))
    evidence, rest_mass = (lse, lse) if evidence is None else (evidence, rest_mass)
    attend_kernel[(row_blocks, plan.splits, pairs)](
        query, new_keys, new_values, table, starts, ends, out, lse, partial, partial_lse,
        partial_rest, counters, evidence, rest_mass, scale, softcap, window, sink_tokens,
        recent_tokens, evidence.stride(-2),
        QUERIES=queries, GROUP=group, KV_HEADS=kv_heads,
        KEY_DIM=key_dim, KEY_BLOCK=max(16, _power_of_two(key_dim)),
        VALUE_DIM=value_dim, VALUE_BLOCK=value_block,
        BLOCK_ROWS=plan.block_rows, KEPT_ROWS=kept, BLOCK_TOKENS=plan.block_tokens,
        NEW_BLOCK=max(16, _power_of_two(queries)), ROW_BLOCKS=row_blocks,
        EXTENTS=table.shape[1] - 1, SPLITS=plan.splits, SPLITS_BLOCK=splits_block,
        MERGE_CHUNK=min(splits_block, max(1, 8192 // (kept * value_block))),
        EVIDENCE_QUERIES=evidence_queries,
        EVIDENCE_BLOCK=evidence_block, SOFTCAP=softcap > 0.0, WINDOW=window > 0,
        NEW_TOKENS=own_tokens, APPEND=append, VALUES=with_values,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


_SCHEMA = (
    "(Tensor query, Tensor new_keys, Tensor new_values, Tensor table, Tensor starts, Tensor ends, "
    "Tensor(a!) counters, Tensor(b!)? evidence, Tensor(c!)? rest_mass, float scale, float softcap, "
    "int window, bool append, bool own_tokens, bool with_values, int sink_tokens, "
    "int recent_tokens, int evidence_queries, int[] plan) -> (Tensor, Tensor)"
)
_operation: Any = torch.library.custom_op(
    "sfi_agent::attend",
    _attend_op,
    mutates_args=("counters", "evidence", "rest_mass"),
    schema=_SCHEMA,
)


@_operation.register_fake  # type: ignore[untyped-decorator]
def _attend_fake(query: Tensor, new_keys: Tensor, new_values: Tensor, *_: Any) -> Any:
    return _empty_results(query, new_values)
