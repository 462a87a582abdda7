"""Kernels for steps over many sequences: attention with evidence, selection, gather.

Everything runs on lengths and addresses that live on the device, so a step can be captured once and
replayed while histories grow and move. Each operation has a plain torch reference (`reference`),
which is also what runs where Triton or a supported device is missing; the choice is logged with its
reason. Importing this package does not import Triton.

    ExtentTable         where histories and memories lie, for all layers and sequences
    plan_attention      tile sizes for a batch and step kind
    attend              one layer's attention: fast, slow with evidence, or a block of queries
    rank, select        evidence to positions, for one layer or for all of them
    gather              positions to filled memories, all layers in one launch
    merge_parts         one softmax out of several, for prefixes that sequences share
"""

from __future__ import annotations

from sfi_agent.engine.kernels.attention import attend, merge_parts
from sfi_agent.engine.kernels.availability import kernel_problem, uses_kernels
from sfi_agent.engine.kernels.gather import gather
from sfi_agent.engine.kernels.options import AttentionOptions, EvidenceBuffers
from sfi_agent.engine.kernels.plans import (
    AttentionPlan,
    DeviceLimits,
    device_limits,
    plan_attention,
)
from sfi_agent.engine.kernels.selection import SelectionScratch, rank, select
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
    "gather",
    "kernel_problem",
    "merge_parts",
    "plan_attention",
    "rank",
    "select",
    "uses_kernels",
]
