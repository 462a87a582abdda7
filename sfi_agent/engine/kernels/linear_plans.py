"""Tile sizes of linear layers over few rows, chosen from shapes alone.

A plan does not depend on the number of rows from 2 to 16, so neither do the bits of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

__all__ = ["MOST_COUNTERS", "MOST_ROWS", "LinearPlan", "plan_linear"]

MOST_ROWS = 16
"""Rows of the padded tile that matrix units multiply; more rows are no longer bound by reading."""

MOST_COUNTERS = 4096
"""Programs of one launch that may be split: as many counters are kept per device."""

_LOAD_BYTES = 16
"""What one thread reads at once."""


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How linear layers that share an input are cut into programs.

    Attributes:
        block_outputs: Lines of weights per program, a power of two; gated, gate and up lines
            together.
        block_inputs: Elements of a line per tile, a power of two. For one row, a multiple of what
            all threads of a program read at once, or inputs are rearranged for every tile.
        splits: Programs that share one block of outputs; 1 for one row.
        warps: Warps per program.
        stages: Tiles in flight per program; 1 keeps the next tile in registers (one row only).
        prefetch_inputs: Elements of each line to fetch into the second-level cache before waiting
            for earlier kernels, a power of two or 0; in use with `early_launch` only.
        early_launch: Programmatic dependent launch, from compute capability 9.0 on: weights are
            read while earlier kernels finish.
    """

    block_outputs: int
    block_inputs: int
    splits: int
    warps: int
    stages: int
    prefetch_inputs: int = 0
    early_launch: bool = False

    def programs(self, outputs: Sequence[int], gated: bool) -> int:
        """Blocks of outputs of one launch, not counting splits."""
        lines = [2 * outputs[0]] if gated else outputs
        return sum(-(-count // self.block_outputs) for count in lines)


@cache
def plan_linear(
    one_row: bool,
    width: int,
    outputs: tuple[int, ...],
    gated: bool,
    element_bytes: int,
    multiprocessors: int,
    early_launch: bool,
) -> LinearPlan:
    """A plan for one launch.

    Args:
        one_row: Whether the input has one row; 2 to 16 rows share a plan.
        width: Input size.
        outputs: Output size of each weight; gated, of gate and up.
        gated: Whether the two weights are gate and up.
        element_bytes: Of weights.
        multiprocessors: Of the device.
        early_launch: Whether the device has programmatic dependent launch.
    """
    lines = 2 * outputs[0] if gated else sum(outputs)
    if one_row:
        plan = _plan_one_row(width, lines, gated, element_bytes, multiprocessors)
    else:
        plan = _plan_many_rows(width, outputs, gated, element_bytes, multiprocessors)
    # Over several rows it was slower on an H100: 3.5 ms instead of 2.9 for 36 layers of Qwen3-4B.
    return replace(plan, early_launch=early_launch and one_row)


def _plan_one_row(
    width: int, lines: int, gated: bool, element_bytes: int, multiprocessors: int
) -> LinearPlan:
    """Few lines per program and many programs, each with two tiles in flight."""
    at_once = 32 * _LOAD_BYTES // element_bytes
    # Narrow outputs give few programs, which must be larger to keep enough reads in flight.
    narrow = lines < 4 * 8 * multiprocessors
    warps = 4 if narrow else 2
    block_outputs = 2 if gated or narrow or lines >= 1 << 16 else 4
    while warps > 1 and warps * at_once > width:
        warps //= 2
    return LinearPlan(block_outputs, warps * at_once, 1, warps, 1, min(256, warps * at_once))


def _plan_many_rows(
    width: int,
    outputs: tuple[int, ...],
    gated: bool,
    element_bytes: int,
    multiprocessors: int,
) -> LinearPlan:
    """Wide blocks of outputs read inputs less often; splits keep all multiprocessors at work."""
    if element_bytes == 4:
        # Without matrix units registers are the limit, not reading.
        return LinearPlan(32, 32, 1, 4, 2, 128)
    plan = LinearPlan(32, 128, 1, 4, 4, 256)
    programs = plan.programs(outputs, gated)
    if programs >= multiprocessors:
        return plan
    tiles = -(-width // plan.block_inputs)
    splits = min(-(-2 * multiprocessors // programs), max(1, tiles // 4), 8)
    return replace(plan, splits=splits)
