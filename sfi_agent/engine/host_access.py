"""Everything that a runner needs for histories in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sfi_agent.engine.history_stream import HistoryStream
from sfi_agent.engine.host_gather import HostGather
from sfi_agent.engine.host_history import HostStore

__all__ = ["HostAccess"]


@dataclass(frozen=True, slots=True)
class HostAccess:
    """See the module text.

    Attributes:
        store: Keeps histories; None on a CPU, where they are in host memory anyway.
        stream: Brings them to the device.
        gather: Fills memories from them.
    """

    store: HostStore | None
    stream: HistoryStream
    gather: HostGather

    @classmethod
    def of(cls, device: torch.device) -> HostAccess:
        """For a model on a device; takes no memory yet."""
        store = HostStore(device) if device.type == "cuda" else None
        return cls(store, HistoryStream(device), HostGather(device))

    @property
    def device_bytes(self) -> int:
        """Memory of the device that is kept for what comes and goes."""
        return self.stream.device_bytes + (self.store.device_bytes if self.store else 0)
