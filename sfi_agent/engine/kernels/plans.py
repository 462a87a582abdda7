"""Tile sizes and splits of the attention kernel, chosen from shapes alone.

A plan never depends on lengths at run time, so that a captured step stays valid. What they reach is
in docs/performance.md (`sfi-agent bench kernels`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["AttentionPlan", "DeviceLimits", "device_limits", "plan_attention"]

_TILE_BYTES = 1 << 14
"""Keys of one tile; with its values and four tiles in flight a program keeps 100 KB in motion."""

_SPLIT_COST = 0.01
"""What one more split costs, as a share of the step: partial results are written and merged."""

_MOST_SPLITS = 128
_SHORT_SPLIT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a plan needs to know of a device.

    Attributes:
        multiprocessors: How many programs run side by side, one on each.
        shared_memory_bytes: What one program may use for tiles.
    """

    multiprocessors: int
    shared_memory_bytes: int


def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; of a small one for devices without kernels."""
    if device.type != "cuda":
        return DeviceLimits(4, 100_000)
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return DeviceLimits(properties.multi_processor_count, shared)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How attention is cut into programs.

    Attributes:
        block_rows: Query rows (queries x group) per program, a power of two of at least 16.
        block_tokens: Keys per tile, a power of two of at least 16.
        splits: Programs that share the tokens of one KV head.
        warps: Warps per program.
        stages: Tiles in flight per program.
    """

    block_rows: int
    block_tokens: int
    splits: int
    warps: int
    stages: int

    def as_list(self) -> list[int]:
        """The plan as the operation takes it."""
        return [self.block_rows, self.block_tokens, self.splits, self.warps, self.stages]

    @classmethod
    def from_list(cls, numbers: list[int]) -> AttentionPlan:
        """The inverse of `as_list`."""
        return cls(*numbers)

    def counters(self, pairs: int, rows: int) -> int:
        """How many counters a launch needs for `pairs` KV heads with `rows` query rows each."""
        return pairs * -(-rows // self.block_rows)


def plan_attention(
    pairs: int, rows: int, tokens: int, head_dim: int, element_bytes: int, limits: DeviceLimits
) -> AttentionPlan:
    """A plan for one layer of a step.

    Two batches may get different numbers of splits, and then differ in rounding: fix the plan
    where outputs must be bit-identical.

    Args:
        pairs: Sequences x KV heads.
        rows: Query rows per KV head: queries x group.
        tokens: Most tokens a sequence may have; lengths may be smaller at run time.
        head_dim: The larger of key and value size.
        element_bytes: Of keys and values.
        limits: Of the device.
    """
    block_rows = _block_rows(rows, head_dim, element_bytes, limits)
    row_blocks = -(-rows // block_rows)
    row_bytes = max(16, _power_of_two(head_dim)) * element_bytes
    block_tokens = max(16, min(128, _TILE_BYTES // row_bytes))
    # Programs of 64 rows are small enough that two of them hide each other's waiting.
    slots = limits.multiprocessors * (2 if block_rows == 64 else 1)
    splits = _splits(pairs * row_blocks, slots, max(1, tokens // (2 * block_tokens)))
    warps = 8 if block_rows == 128 else 4
    if block_rows == 16 and tokens <= splits * _SHORT_SPLIT_TOKENS:
        block_tokens, warps = max(16, block_tokens // 2), 2
    tile_bytes = 2 * block_tokens * row_bytes
    stages = 4 if block_rows == 16 else 3
    while stages > 2 and stages * tile_bytes > limits.shared_memory_bytes * 3 // 4:
        stages -= 1
    return AttentionPlan(block_rows, block_tokens, splits, warps, stages)


def _block_rows(rows: int, head_dim: int, element_bytes: int, limits: DeviceLimits) -> int:
    """Rows that share one read of the tokens, as far as registers and shared memory go."""
    if rows <= 16 or element_bytes == 4:
        # Without matrix units, as in float32, larger blocks spill their registers.
        return 16
    # Up to 128 rows read the tokens once; of more, blocks of 64 compute faster than of 128.
    block_rows = 128 if 64 < rows <= 128 else 64
    # The merge holds the block's outputs twice in float32.
    row_bytes = 2 * 4 * _power_of_two(head_dim)
    while block_rows > 16 and block_rows * row_bytes > limits.shared_memory_bytes * 9 // 10:
        block_rows //= 2
    return block_rows


def _splits(programs: int, slots: int, most: int) -> int:
    """The number of splits that leaves the fewest slots idle in the last wave."""
    allowed = range(1, min(most, _MOST_SPLITS) + 1)

    def seconds(splits: int) -> float:
        waves = -(-programs * splits // slots)
        return waves / splits * (1.0 + _SPLIT_COST * splits)

    return min(allowed, key=seconds)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
