"""What a benchmark needs on its device, added up before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sfi_agent.engine.kernels import make_scratch
from sfi_agent.engine.programs.cohort_programs import capacity_class
from sfi_agent.errors import InputError, explain
from sfi_agent.evaluation.decode_benchmark.clock import copy_bytes
from sfi_agent.evaluation.decode_benchmark.options import (
    LONGEST_FREE_SEGMENT,
    DecodeOptions,
)
from sfi_agent.evaluation.decode_benchmark.setting import Setting
from sfi_agent.evaluation.decode_benchmark.sizes import ModelSizes
from sfi_agent.plugins import build_selector
from sfi_agent.protocols import declared_ranking

if TYPE_CHECKING:
    from sfi_agent.protocols import Selector

__all__ = ["free_bytes", "host_bytes", "needed_bytes", "refuse_without_room"]

_WORKING_BYTES = {"cuda": 3 << 29, "cpu": 1 << 27}
"""For libraries, activations and what captured steps keep between two kernels."""
_HOST_ROOM_BYTES = 9 << 26
"""Where histories in host memory pass through, and where new tokens leave from."""
_BLOCK_STEP = 8
_SPARSE_ARMS = frozenset({"slow", "fast", "observe", "rectify", "verify", "selection"})
_BLOCK_ARMS = frozenset({"rectify", "verify", "selection"})


def needed_bytes(setting: Setting) -> dict[str, int]:
    """Bytes by what takes them. The arm `generate` is not among them: it is left out where its
    copy of the histories finds no room."""
    sizes, options, config = setting.sizes, setting.options, setting.config
    on_cuda, batch = setting.device.type == "cuda", options.batch
    tokens = setting.context_tokens + setting.room_tokens
    on_device = sizes.layers - setting.streamed_layers
    parts = {
        "weights": sizes.weight_bytes,
        f"{batch} histories of {setting.context_tokens:,} tokens": (
            batch * tokens * on_device * sizes.layer_token_bytes
        ),
    }
    if setting.on_host:
        parts["rooms for histories in host memory"] = _HOST_ROOM_BYTES
    if _SPARSE_ARMS & set(options.arms):
        memory = config.memory
        slots = memory.sink_tokens + memory.selected_tokens + memory.recent_tokens
        slots += options.longest_segment() + 2
        layers = sizes.layers - len(memory.dense_layers)
        parts[f"{batch} memories of {slots:,} tokens"] = (
            batch * slots * layers * sizes.layer_token_bytes
        )
        selector = build_selector(config.selector, default_seed=config.sampling.seed)
        captured = on_cuda and not setting.on_host
        parts["evidence"] = _evidence_bytes(sizes, tokens, batch, selector, on_cuda=captured)
        if "key_norms" in selector.needs and not (captured and declared_ranking(selector)):
            # Of streamed layers they are computed anew, one layer at a time.
            layers = on_device or 1
            parts["norms of keys"] = 4 * batch * tokens * layers * sizes.kv_heads
    if on_cuda:
        parts["logits of captured steps"] = _logit_bytes(sizes, options)
    kind = setting.device.type
    parts["copied buffer"] = 2 * (options.copy_bytes or copy_bytes(kind))
    parts["working space"] = _WORKING_BYTES.get(kind, _WORKING_BYTES["cpu"])
    return parts


def host_bytes(setting: Setting) -> dict[str, int]:
    """Bytes of host memory by what takes them, where histories are there; else none."""
    if not setting.on_host:
        return {}
    options, tokens = setting.options, setting.context_tokens + setting.room_tokens
    size = options.batch * tokens * setting.streamed_layers * setting.sizes.layer_token_bytes
    return {
        f"{options.batch} histories of {setting.context_tokens:,} tokens": size,
        "copied buffer": options.copy_bytes or copy_bytes(setting.device.type),
    }


def refuse_without_room(parts: dict[str, int], free: int | None, what: str) -> None:
    """Refuse what does not fit.

    Args:
        parts: From `needed_bytes`.
        free: From `free_bytes`; None is not looked at.
        what: What was asked for, in words.

    Raises:
        InputError: With all parts and what to lower.
    """
    if free is None or sum(parts.values()) <= free:
        return
    shown = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    raise InputError(
        explain(
            f"benchmarked decoding of {what}",
            got=f"{sum(parts.values()) / 1e9:.1f} GB needed ({shown})",
            allowed=f"{free / 1e9:.1f} GB, which are free on the device",
            remedy="lower --context, --batch or --budget, or take a smaller --shape",
        )
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had now; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _evidence_bytes(
    sizes: ModelSizes, tokens: int, batch: int, selector: Selector, *, on_cuda: bool
) -> int:
    """Float32 logits, and what ranks them."""
    if not on_cuda:
        # Every sequence keeps room for the logits of one layer, which grows by an eighth.
        return batch * sizes.query_heads * tokens * 4 * 9 // 8
    capacity, slots = capacity_class(tokens), 1 << (batch - 1).bit_length()
    ranking = declared_ranking(selector)
    kept = 1 if ranking is not None else sizes.layers
    logits = 4 * kept * slots * sizes.query_heads * capacity
    if ranking is None:
        return logits
    nowhere = torch.device("meta")
    scratch = make_scratch(ranking, sizes.layers, slots, sizes.kv_heads, capacity, nowhere)
    return logits + scratch.bytes


def _logit_bytes(sizes: ModelSizes, options: DecodeOptions) -> int:
    """Float32 logits that every captured step keeps, and their twins while it runs."""
    rows = 3
    if _BLOCK_ARMS & set(options.arms):
        longest = max(options.longest_segment(), LONGEST_FREE_SEGMENT) + 1
        rows += sum(range(_BLOCK_STEP, longest + _BLOCK_STEP, _BLOCK_STEP)) + longest
    slots = 1 << (options.batch - 1).bit_length()
    return 4 * slots * rows * sizes.vocabulary_size
