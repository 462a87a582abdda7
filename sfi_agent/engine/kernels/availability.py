"""Whether the Triton kernels can run here, and if not, why."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from sfi_agent.engine.kernels.plans import device_limits
from sfi_agent.observe.log import log_event

__all__ = ["kernel_problem", "uses_kernels"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_HEAD = 256
_OLDEST_CAPABILITY = (8, 0)
_WIDE_FLOAT32_BYTES = 164_000
"""Shared memory that a block of queries over float32 heads of 256 takes, as compiled."""


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _interpreted() -> bool:
    """Triton's interpreter runs kernels on the CPU; it is chosen before Triton is imported."""
    from sfi_agent.engine.kernels.merge_kernel import finish

    return not isinstance(finish, import_module("triton.runtime").JITFunction)


def kernel_problem(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int
) -> str | None:
    """What keeps the kernels from running on such tensors, in words; None if nothing does."""
    if not _installed():
        return "Triton is not installed"
    if _interpreted():
        if dtype is torch.bfloat16:
            return "Triton's interpreter has no products in bfloat16"
    else:
        if device.type != "cuda":
            return f"no kernels for {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            return f"compute capability {capability} is below {_OLDEST_CAPABILITY}"
        shared = device_limits(device).shared_memory_bytes
        if (
            dtype is torch.float32
            and max(key_dim, value_dim) > 128
            and shared < _WIDE_FLOAT32_BYTES
        ):
            return f"{shared} bytes of shared memory are too few for float32 heads over 128"
    if dtype not in _DTYPES:
        return f"no kernels for {dtype}"
    for size in (key_dim, value_dim):
        if size > _LARGEST_HEAD or size % 8:
            return f"head size {size} is not a multiple of 8 up to {_LARGEST_HEAD}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def uses_kernels(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether to launch kernels; the choice and its reason are logged once per combination."""
    return _choose(device, dtype, key_dim, value_dim)


@cache
def _choose(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    problem = kernel_problem(device, dtype, key_dim, value_dim)
    values = {
        "device": str(device),
        "dtype": str(dtype),
        "key_dim": key_dim,
        "value_dim": value_dim,
    }
    if problem is None or device.type == "cpu":
        kernels = "triton" if problem is None else "reference"
        log_event(
            "debug", "step_kernels_chosen", kernels=kernels, reason=problem or "supported", **values
        )
    else:
        log_event("warning", "step_kernels_missing", reason=problem, **values)
    return problem is None
