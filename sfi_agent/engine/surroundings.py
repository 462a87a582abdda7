"""The settings of a thread under which steps are computed, whatever the caller has set there.

A session outlives the call that made it. Under `torch.inference_mode` its keys and values would be
tensors that nobody may append to outside of it, and under `torch.autocast` they would have another
number type than the weights, so that what a session says depended on who calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["own_surroundings"]


def own_surroundings(device: torch.device) -> AbstractContextManager[object]:
    """For everything that computes or keeps tensors of a sequence.

    Args:
        device: Of the model. Kernels of our own go to the current CUDA device, so it becomes that.
    """
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type):
        return _undone(device)
    return _current(device)


@contextmanager
def _undone(device: torch.device) -> Iterator[None]:
    # Leaving inference mode switches gradients on; nothing here has any.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        _current(device),
    ):
        yield


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
