"""Kernels for steps over many sequences: attention with evidence, selection, gather.

Everything runs on lengths and addresses that live on the device, so a step can be captured once and
replayed while histories grow and move. Each operation has a plain torch reference (`reference`),
which is also what runs where Triton or a supported device is missing; the choice is logged with its
reason. Importing this package does not import Triton.

    ExtentTable         where histories and memories lie, for all layers and sequences
    plan_attention      tile sizes for a batch and step kind
    attend              one layer's attention: fast, slow with evidence, or a block of queries
    rank, select        evidence to positions, for one layer or for all of them
    rank_layer, select_ranked   the same, as a selector's `Ranking` says
    gather              positions to filled memories, all layers in one launch
    flush               fast tokens from memories to histories, all layers in one launch
    merge_parts         one softmax out of several, for prefixes that sequences share
    skinny_linear       linear layers over 1 to 16 rows that share an input, in one launch
    skinny_gated        silu of one times another, of the same input, in one launch
"""

from __future__ import annotations

from sfi_agent.engine.kernels.attention import attend, merge_parts
from sfi_agent.engine.kernels.availability import kernel_problem, uses_kernels
from sfi_agent.engine.kernels.flush import flush
from sfi_agent.engine.kernels.fused_selection import (
    kept_range,
    make_scratch,
    rank_layer,
    select_ranked,
)
from sfi_agent.engine.kernels.gather import gather
from sfi_agent.engine.kernels.linear import linear_problem, skinny_gated, skinny_linear
from sfi_agent.engine.kernels.options import AttentionOptions, EvidenceBuffers
from sfi_agent.engine.kernels.plans import (
    AttentionPlan,
    DeviceLimits,
    device_limits,
    plan_attention,
)
from sfi_agent.engine.kernels.scratch import SelectionScratch
from sfi_agent.engine.kernels.selection import rank, select
from sfi_agent.engine.kernels.tables import ExtentPlace, ExtentTable, LayerExtents

__all__ = [
    "AttentionOptions",
    "AttentionPlan",
    "DeviceLimits",
    "EvidenceBuffers",
    "ExtentPlace",
    "ExtentTable",
    "LayerExtents",
    "SelectionScratch",
    "attend",
    "device_limits",
    "flush",
    "gather",
    "kept_range",
    "kernel_problem",
    "linear_problem",
    "make_scratch",
    "merge_parts",
    "plan_attention",
    "rank",
    "rank_layer",
    "select",
    "select_ranked",
    "skinny_gated",
    "skinny_linear",
    "uses_kernels",
]
