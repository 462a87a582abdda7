"""What fills a device, so that running out of memory names parts that somebody can make smaller."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sfi_agent.engine.sequence import SequenceState
from sfi_agent.errors import OutOfDeviceMemoryError, explain

if TYPE_CHECKING:
    from sfi_agent.engine.runner import Runner

__all__ = ["memory_parts", "typed_memory_errors"]

_REMEDY = (
    "lower memory.selected_tokens or the number of sessions, close sessions that are no longer "
    "needed, shorten histories or keep them in host memory (history.device: cpu), set "
    "history.reserve_tokens so that buffers need not grow, or lower prefill_chunk_tokens of the "
    "Engine"
)


def memory_parts(runner: Runner, sequences: Sequence[SequenceState]) -> dict[str, int]:
    """Bytes of the device by what holds them, as far as the steps of these sequences can see."""
    histories = sum(item.history_bytes - item.host_bytes for item in sequences)
    parts = {
        "weights": sum(parameter.nbytes for parameter in runner.model.parameters()),
        f"histories of {len(sequences)} sequences": histories,
        f"memories of {len(sequences)} sequences": sum(item.memory_bytes for item in sequences),
    }
    if runner.programs is not None:
        parts["evidence and selection of captured steps"] = runner.programs.bytes
    device = runner.shape.device
    if any(item.streamed for item in sequences):
        parts["rooms for histories in host memory"] = runner.host.device_bytes
    if device.type == "cuda":
        known = sum(parts.values())
        used = torch.cuda.memory_allocated(device)
        parts["other sessions, activations and captured steps"] = max(0, used - known)
        parts["free"] = torch.cuda.mem_get_info(device)[0]
    return parts


@contextmanager
def typed_memory_errors(runner: Runner, sequences: Sequence[SequenceState]) -> Iterator[None]:
    """Turn a device's out-of-memory error into ours, with the parts and their sizes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        parts = memory_parts(runner, sequences)
        shown = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
        raise OutOfDeviceMemoryError(
            explain(
                "stepped on a device without enough free memory",
                got=f"{str(error).splitlines()[0].rstrip('.')} ({shown})",
                remedy=_REMEDY,
            ),
            parts=parts,
        ) from error
