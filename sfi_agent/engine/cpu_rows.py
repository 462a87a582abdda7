"""Attention of a few query rows on a CPU, by a small C file that is compiled when it is needed.

torch's kernels take twice the time that reading keys and values takes when there are only a few
rows, and none multiplies bfloat16 numbers without rounding the products to bfloat16. `cpu_rows.c`
attends and multiplies at the speed of memory; it is compiled for this processor and these sizes in
a fraction of a second, once per process. Where that cannot be done the reason is logged and callers
use torch.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sfi_agent.engine.attention_rule import AttentionRule
from sfi_agent.observe.log import log_event

__all__ = ["RowKernels", "row_kernels"]

_MINIMUM_TOKENS = 512
"""Below, calling torch takes no longer, and no compiler is started for a short session."""

_LARGEST_ROWS = 8
"""More rows keep a matrix unit busy: torch's products are then the better ones."""

_LARGEST_HEAD = 256
_LANES = 16
_SPLIT_TOKENS = 1024
_LARGEST_SPLITS = 16
"""A head's tokens are cut in parts for the threads; a bounded number, whatever the history."""

_COMPILE_SECONDS = 60
_SOURCE = Path(__file__).with_suffix(".c")


class RowKernels:
    """The compiled functions for one number of rows and one head size.

    Args:
        library: From `cpu_rows.c`.
        rows: Query rows per KV head.
        value_dim: Size of a value.
    """

    def __init__(self, library: ctypes.CDLL, rows: int, value_dim: int) -> None:
        pointer, long, real, whole = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
        self._rows, self._value_dim = rows, value_dim
        self._logits, self._attend = library.rows_logits, library.rows_attend
        self._logits.argtypes = [
            *(pointer, pointer, long, long, long, real, real),
            *(pointer, long, whole),
        ]
        self._attend.argtypes = [
            *(pointer, pointer, pointer, long, long, long, long, real, real),
            *(pointer, long, pointer, whole),
        ]
        self._logits.restype = self._attend.restype = None

    def logits(
        self, query: Tensor, keys: Tensor, scale: float, out: Tensor, softcap: float = 0.0
    ) -> None:
        """Write scaled logits, in float32 from the first product on.

        Args:
            query: `[kv_heads, rows, key_dim]` bfloat16.
            keys: `[kv_heads, tokens, key_dim]` bfloat16.
            scale: Factor of the logits.
            out: `[kv_heads, rows, tokens]` float32, a slice along the tokens of a dense tensor.
            softcap: See `AttentionRule`.
        """
        query = query.contiguous()
        heads, tokens = keys.shape[:2]
        self._logits(
            query.data_ptr(),
            *(keys.data_ptr(), keys.stride(0), heads, tokens, scale, softcap),
            *(out.data_ptr(), out.stride(1), torch.get_num_threads()),
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0
    ) -> Tensor:
        """Attention of rows that see every token, `[kv_heads, rows, value_dim]` bfloat16.

        Args:
            query: `[kv_heads, rows, key_dim]` bfloat16.
            keys: `[kv_heads, tokens, key_dim]` bfloat16.
            values: `[kv_heads, tokens, value_dim]` bfloat16.
            scale: Factor of the logits.
            softcap: See `AttentionRule`.
        """
        query = query.contiguous()
        heads, tokens = keys.shape[:2]
        splits = min(max(1, tokens // _SPLIT_TOKENS), _LARGEST_SPLITS)
        parts = torch.empty(heads * splits * self._rows * (self._value_dim + 2))
        out = query.new_empty(heads, self._rows, self._value_dim)
        self._attend(
            *(query.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(keys.stride(0), values.stride(0), heads, tokens, scale, softcap),
            *(parts.data_ptr(), splits, out.data_ptr(), torch.get_num_threads()),
        )
        return out


def row_kernels(query: Tensor, keys: Tensor, values: Tensor) -> RowKernels | None:
    """The compiled functions, if they are for such tensors and can be had.

    Args:
        query: `[kv_heads, rows, key_dim]`.
        keys: `[kv_heads, tokens, key_dim]`.
        values: `[kv_heads, tokens, value_dim]`.
    """
    if keys.device.type != "cpu" or keys.shape[1] < _MINIMUM_TOKENS:
        return None
    if torch.compiler.is_compiling():
        return None
    rows = query.shape[1]
    if rows > _LARGEST_ROWS or any(t.dtype is not torch.bfloat16 for t in (query, keys, values)):
        return None
    for tensor in (keys, values):
        dim = tensor.shape[-1]
        if dim % _LANES or dim > _LARGEST_HEAD or tensor.stride()[1:] != (dim, 1):
            return None
    return _built(rows, keys.shape[-1], values.shape[-1])


@cache
def _built(rows: int, key_dim: int, value_dim: int) -> RowKernels | None:
    sizes = {"rows": rows, "key_dim": key_dim, "value_dim": value_dim}
    try:
        library = _compiled(sizes)
        kernels = RowKernels(library, rows, value_dim)
        _check(kernels, **sizes)
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        log_event("info", "cpu_kernels_missing", reason=str(error), **sizes)
        return None
    log_event("debug", "cpu_kernels_built", **sizes)
    return kernels


def _compiled(sizes: dict[str, int]) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler (gcc or cc) on the path")
    macros = [f"-D{name.upper()}={value}" for name, value in sizes.items()]
    flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", *macros]
    with tempfile.TemporaryDirectory(prefix="sfi-agent-") as folder:
        compiled, linked = Path(folder, "rows.o"), Path(folder, "rows.so")
        # Linked without -fopenmp: its functions are then those of torch's own runtime, whose
        # threads are there already. A second runtime would fight them for the cores.
        for command in (
            [compiler, *flags, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
        # Loaded code stays mapped when its file is gone.
        return ctypes.CDLL(str(linked))


def _check(kernels: RowKernels, rows: int, key_dim: int, value_dim: int) -> None:
    """Compare with torch on a few numbers: a miscompiled kernel must not decode anything."""
    tokens, heads, scale = 1061, 2, key_dim**-0.5
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(heads, count, dim, generator=generator).bfloat16()
        for count, dim in ((rows, key_dim), (tokens, key_dim), (tokens, value_dim))
    )
    for softcap in (0.0, 1.5):
        logits = torch.empty(heads, rows, tokens)
        kernels.logits(query, keys, scale, logits, softcap)
        exact = torch.bmm(query.float(), keys.float().transpose(1, 2)) * scale
        exact = AttentionRule(scale, softcap).cap(exact)
        error = float((logits - exact).abs().max())
        expected = torch.bmm(exact.softmax(-1), values.float())
        found = kernels.attend(query, keys, values, scale, softcap).float()
        difference = float((found - expected).abs().max())
        if not (error < 1e-4 and difference < 1e-2) or math.isnan(error + difference):
            raise RuntimeError(f"results differ from torch's by {error:.1e} and {difference:.1e}")
